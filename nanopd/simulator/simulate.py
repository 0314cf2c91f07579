"""A cluster in virtual time: workers, the central scheduler over them, and a workload."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from nanopd.block_manager.manager import BlockSpaceManager
from nanopd.block_manager.pool import EVENTS_KEPT
from nanopd.config import ROLES, SLO, CacheConfig, ConfigError, SchedulerConfig, check_mode
from nanopd.core import Request, RequestMetrics, SamplingParams, TokenEvent
from nanopd.cost_model.analytical import Shape
from nanopd.engine.engine import STEPS_KEPT, Engine
from nanopd.engine.limits import Limits
from nanopd.engine.scheduler import Scheduler
from nanopd.metrics import Summary, summarize
from nanopd.router.central_scheduler import CentralScheduler
from nanopd.router.routing import Router
from nanopd.router.timeline import Timeline
from nanopd.simulator.clock import VirtualClock
from nanopd.simulator.cost_runner import END, CostRunner, LaunchingCostRunner, StepCosts
from nanopd.simulator.executor import Station, VirtualExecutor
from nanopd.simulator.link import TimedLink
from nanopd.simulator.workload import Arrival, checked
from nanopd.workers.worker import Worker


@dataclass(frozen=True)
class CacheShape:
    """A KV cache without the cache: what a worker asks about it."""

    num_layers: int
    bytes_per_block: int


@dataclass(slots=True)
class Served:
    """A request that was simulated. Times in virtual seconds."""

    request_id: str
    prompt_len: int
    metrics: RequestMetrics
    timeline: Timeline
    num_tokens: int = 0  # of the answer

    @property
    def arrival(self) -> float:
        return self.metrics.arrival_time

    @property
    def ttft(self) -> float:
        return self.metrics.first_token_time - self.arrival

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token."""
        return self.metrics.tpot(self.num_tokens)

    @property
    def e2e(self) -> float:
        return self.metrics.finish_time - self.arrival

    @property
    def path(self) -> list[str]:
        """Worker ids, in order."""
        return self.timeline.path

    @property
    def mode(self) -> str:
        return "collocated" if len(self.path) == 1 else "disaggregated"


@dataclass(frozen=True)
class Result:
    """What came of a simulation: the requests in the order of their arrival, how many virtual seconds it took until all was
    over, how many of them each worker spent in steps, and how many tokens of prompts each one found in its cache."""

    requests: list[Served]
    seconds: float
    busy: dict[str, float]
    cached_tokens: dict[str, int]

    @property
    def utilisation(self) -> dict[str, float]:
        """Share of the time that each worker spent in steps."""
        return {worker_id: busy / self.seconds if self.seconds else 0.0 for worker_id, busy in self.busy.items()}

    def summary(self, slo: SLO | None = None) -> Summary:
        return summarize(self.requests, slo)


class Simulation:
    """Simulated workers, each on a device of its own, under a real central scheduler.

    Args:
        workers: how many of each role: {"C": 8}, {"P": 3, "D": 5}.
        mode: as for a cluster.
        shape: the model's number of layers, and the bytes that travel.
        costs: how long steps and transfers take.
        cache, scheduler: of every worker.
        latency: seconds that a message takes between the central scheduler and a worker.
        runs_ahead: the devices work on their own, as GPUs do, so that each step is planned while the one before it runs.
        history: keep what the workers have done lately, to look at. It takes much longer and changes nothing else: without it,
            steps in which nothing is decided are taken many at once.

    Raises:
        ConfigError: an unknown role or mode, or one that lacks its workers.
    """

    def __init__(self, workers: Mapping[str, int], mode: str, shape: Shape, costs: StepCosts, cache: CacheConfig,
                 scheduler: SchedulerConfig, *, router: Router | None = None, latency: float = 0.0, runs_ahead: bool = False,
                 history: bool = False) -> None:
        _check_workers(workers, mode)
        if not (latency >= 0 and math.isfinite(latency)):
            raise ConfigError(f"latency is a number of seconds of at least 0, got {latency!r}")
        self.shape, self.costs, self.cache, self.scheduler = shape, costs, cache, scheduler
        self.limits = Limits(sys.maxsize, scheduler.max_model_len, cache.num_blocks, cache.block_size, scheduler.max_num_seqs)
        self.clock = VirtualClock()
        self._output_lens: dict[str, int] = {}  # by request id, of those that are open
        worker_ids = [f"{role}{number}" for role, how_many in workers.items() for number in range(how_many)]
        self.devices = {worker_id: f"cuda:{number}" for number, worker_id in enumerate(worker_ids)}
        self.stations = {worker_id: self._station(worker_id, runs_ahead, history) for worker_id in worker_ids}
        self.executor = VirtualExecutor(self.stations, self.clock, latency)
        self.central = CentralScheduler(self.executor, mode, self.limits, max_queued=sys.maxsize, clock=self.clock)
        self._open: dict[str, Served] = {}

    def run(self, workload: Iterable[Arrival]) -> Result:
        """Serve all of a workload. A simulation runs once.

        Raises ConfigError where the workload is empty, out of order, or has a request that no worker could take.
        """
        if self.clock.now > 0:
            raise RuntimeError("this simulation has run: make a new one")
        arrivals = checked(workload, self.limits.max_len)
        served = []
        for number, arrival in enumerate(arrivals):
            while self.clock.now < arrival.time:
                self._take(self.central.step(arrival.time - self.clock.now))
            served.append(self._submit(number, arrival))
        while self._open or self.executor.pending:
            self._go_on()
        workers = {worker_id: station.worker for worker_id, station in self.stations.items()}
        return Result(served, max(one.metrics.finish_time for one in served),
                      {worker_id: worker.engine.runner.busy for worker_id, worker in workers.items()},
                      {worker_id: worker.manager.counters.hit_tokens for worker_id, worker in workers.items()})

    def _go_on(self) -> None:
        stood_still = not self.executor.pending
        events = self.central.step(math.inf)
        if stood_still and not events and not self.executor.pending:
            raise RuntimeError(f"the simulation stands still: {len(self._open)} requests are open, and nothing will happen")
        self._take(events)

    def _submit(self, number: int, arrival: Arrival) -> Served:
        request_id = str(number)
        self._output_lens[request_id] = arrival.output_len
        sampling = SamplingParams(max_tokens=arrival.max_tokens)
        self.central.submit(Request(request_id, arrival.prompt(number), sampling, arrival_time=arrival.time))
        served = Served(request_id, arrival.prompt_len, RequestMetrics(arrival.time), self.central.timelines[request_id])
        self._open[request_id] = served
        return served

    def _take(self, events: list[TokenEvent]) -> None:
        for event in events:
            if event.error is not None:
                raise RuntimeError(f"request {event.request_id} failed in the simulation: {event.error}")
            served = self._open[event.request_id]
            if served.num_tokens == 0:
                served.metrics.first_token_time = event.time
            served.num_tokens += 1
            if event.finish_reason is not None:
                served.metrics.finish_time = event.time
                del self._open[event.request_id], self._output_lens[event.request_id]

    def _station(self, worker_id: str, runs_ahead: bool, history: bool) -> Station:
        clock = VirtualClock()
        manager = BlockSpaceManager.from_config(self.cache, EVENTS_KEPT if history else 0)
        runner = (LaunchingCostRunner if runs_ahead else CostRunner)(
            self.costs, clock, self.shape.num_layers, self._output_lens)
        engine = Engine(runner, Scheduler(self.scheduler, manager, eos_token_ids=(END,)), self.limits, clock=clock,
                        steps_kept=STEPS_KEPT if history else 0)
        cache = CacheShape(self.shape.num_layers, self.shape.kv_bytes_per_token * self.cache.block_size)
        links: dict[str, TimedLink] = {}
        worker = Worker(worker_id, worker_id[0], engine, cache, partial(self._connect, links, clock, worker_id))
        return Station(worker, clock, links, leaps=not history)

    def _connect(self, links: dict[str, TimedLink], clock: VirtualClock, source: str, destination: str) -> TimedLink:
        """The link from one worker, whose clock and links these are, to another."""
        if destination not in links:
            costs = self.costs.link(self.devices[source], self.devices[destination])
            links[destination] = TimedLink(costs, clock, self.cache.block_size, self.shape.num_layers)
        return links[destination]


def _check_workers(workers: Mapping[str, int], mode: str) -> None:
    for role, how_many in workers.items():
        if role not in ROLES:
            raise ConfigError(f"unknown role {role!r}; roles are "
                              + ", ".join(f"{letter} ({name})" for letter, name in ROLES.items()))
        if how_many < 0:
            raise ConfigError(f"there can't be {how_many} workers of role {role}")
    check_mode(mode, {role for role, how_many in workers.items() if how_many}, "there are")
