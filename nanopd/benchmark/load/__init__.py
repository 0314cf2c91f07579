"""Load from outside: requests that come when they come, however busy the server is, and what their clients saw."""

from nanopd.benchmark.load.cluster import serve_cluster
from nanopd.benchmark.load.record import ClientRecord, Load
from nanopd.benchmark.load.schedule import Schedule, poisson_schedule, trace_schedule

__all__ = ["ClientRecord", "Load", "Schedule", "poisson_schedule", "serve_cluster", "trace_schedule"]
