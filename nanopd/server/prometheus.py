"""What there is to count, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanopd.core import RequestOutput
from nanopd.messages import Status
from nanopd.server.driver import Driver

TTFT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
TPOT = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1)
E2E = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)


class Metrics:
    """In a registry of their own: a process may hold several servers."""

    def __init__(self, driver: Driver) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("nanopd_requests", "HTTP requests that have ended.", ("endpoint", "outcome"), registry=self.registry)
        self.open = Gauge("nanopd_requests_open", "HTTP requests under way.", registry=self.registry)
        self.streams = Gauge("nanopd_streams_open", "Of those, answers being streamed.", registry=self.registry)
        self._ttft = self._histogram("nanopd_time_to_first_token_seconds", "From a request's arrival.", TTFT)
        self._tpot = self._histogram("nanopd_time_per_output_token_seconds", "Mean over a prompt's answer after its first token.", TPOT)
        self._e2e = self._histogram("nanopd_request_seconds", "From a request's arrival to its prompt's last token.", E2E)
        self._blocks = Gauge("nanopd_kv_blocks", "Blocks of a worker's KV cache.", ("worker", "state"), registry=self.registry)
        self.registry.register(_OfDriver(driver))

    def observe(self, output: RequestOutput, arrival: float) -> None:
        """A prompt that was answered; `arrival` on the monotonic clock."""
        times = output.metrics
        if output.error is not None or times.first_token_time is None or times.finish_time is None:
            return
        self._ttft.observe(times.first_token_time - arrival)
        self._e2e.observe(times.finish_time - arrival)
        tpot = times.tpot(max(len(answer.token_ids) for answer in output.outputs))
        if tpot is not None:
            self._tpot.observe(tpot)

    def render(self, workers: Mapping[str, Status]) -> bytes:
        """All there is, in Prometheus' text format."""
        self._blocks.clear()  # of workers that are lost
        for worker_id, status in workers.items():
            self._blocks.labels(worker_id, "free").set(status.num_free_blocks)
            self._blocks.labels(worker_id, "used").set(status.num_blocks - status.num_free_blocks)
        return generate_latest(self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, documentation, buckets=buckets, registry=self.registry)


class _OfDriver:
    """What the driver counts itself, looked up when it is asked for."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def collect(self) -> Iterator[Metric]:
        waiting, running = self._driver.num_open()
        yield GaugeMetricFamily("nanopd_prompts_waiting", "Prompts in the cluster without a token yet.", waiting)
        yield GaugeMetricFamily("nanopd_prompts_running", "Prompts in the cluster with a token.", running)
        yield CounterMetricFamily("nanopd_prompt_tokens", "Tokens of prompts let in.", self._driver.num_prompt_tokens)
        yield CounterMetricFamily("nanopd_generated_tokens", "Tokens written.", self._driver.num_tokens)
