"""Load from outside: requests that come when they come, however busy the server is, and what their clients saw. No torch."""

from nanopd.benchmark.load.cluster import serve_cluster
from nanopd.benchmark.load.metrics import load_metrics
from nanopd.benchmark.load.record import ClientRecord, Load, Stopped, Tally
from nanopd.benchmark.load.run import RunRecord, RunSettings, open_cluster, run_on_cluster, run_on_endpoint
from nanopd.benchmark.load.schedule import Schedule, poisson_schedule, trace_schedule
from nanopd.benchmark.load.workloads import workload

__all__ = ["ClientRecord", "Load", "RunRecord", "RunSettings", "Schedule", "Stopped", "Tally", "load_metrics", "open_cluster",
           "poisson_schedule", "run_on_cluster", "run_on_endpoint", "serve_cluster", "trace_schedule", "workload"]
