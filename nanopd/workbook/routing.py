"""What chapter 06 tries its routers with: a simulated cluster of H200s, a table of regrets, and two routers to learn from.

All of it is simulated, by the costs of the profile that comes with the package; nothing here was measured on your machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from statistics import fmean
from types import SimpleNamespace

from nanopd.config import CacheConfig, SchedulerConfig
from nanopd.cost_model.presets import preset
from nanopd.router.cost_router import CostRouter
from nanopd.router.length_predictor import BayesianLengthPredictor
from nanopd.router.routing import Decision, Ended, Question, Router, WorkerView
from nanopd.simulator import Arrival, ModelCosts, Result, Simulation

PROFILE = "nvidia-h200/qwen3-8b"
CHUNK = 2048  # tokens a step
CACHE = CacheConfig(num_blocks=16_384, block_size=16)
SCHEDULER = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=CHUNK, max_model_len=16_384)
WORKERS = {"C": 4, "P": 1, "D": 1}
SEEN = ("worker_id", "role", "device", "queued", "queued_since", "running", "seats", "free_seats", "free_tokens",
        "sending_tokens", "prompts_per_second", "cached_tokens")  # what a view shows, but for is_open


def reference(**options: object) -> CostRouter:
    """The engine's own router, fresh. `options`: as for `CostRouter`."""
    return CostRouter(preset(PROFILE).cost, BayesianLengthPredictor(), chunk_tokens=CHUNK, **options)


def simulate(router: Router, load: Sequence[Arrival], workers: Mapping[str, int] = WORKERS) -> tuple[Simulation, Result]:
    """Serve a load with a router, and return the simulation too: `simulation.central.explain(request_id)`."""
    cost = preset(PROFILE).cost
    simulation = Simulation(workers, "adaptive", cost.shape, ModelCosts(cost), CACHE, SCHEDULER, router=router)
    return simulation, simulation.run(load)


def trace(num_requests: int = 200, rate: float = 30.0, seed: int = 7) -> list[Arrival]:
    """Short questions, and now and then a burst of long documents; answers of very different lengths. `rate` is the mean."""
    random, now, arrivals = Random(seed), 0.0, []
    while len(arrivals) < num_requests:
        is_burst = random.random() < 0.06
        now += random.expovariate(rate / 1.3)
        for _ in range(6 if is_burst else 1):
            prompt_len = random.randint(3000, 8000) if is_burst else random.randint(50, 600)
            output_len = min(max(round(random.lognormvariate(4.3, 0.8)), 2), 600)
            arrivals.append(Arrival(now, prompt_len, output_len, max_tokens=1024))
    return arrivals[:num_requests]


def regret(result: Result, best: Result) -> float:
    """By which share the requests took longer, on average, than with the other router."""
    return fmean(one.e2e for one in result.requests) / fmean(one.e2e for one in best.requests) - 1


class _Around:
    """Around the reference, which goes on learning."""

    def __init__(self, router: CostRouter) -> None:
        self.router = router

    def ended(self, answer: Ended) -> None:
        self.router.ended(answer)


class Detour(_Around):
    """As the reference says, but for one request, which goes by the best route of the way that was not chosen."""

    def __init__(self, router: CostRouter, request_id: str) -> None:
        super().__init__(router)
        self.request_id = request_id

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        decision = self.router.choose(question, workers)
        if decision is None or question.request_id != self.request_id:
            return decision
        others = [score.route for score in decision.scores if score.route.mode != decision.route.mode]
        return Decision(others[0], decision.scores) if others else decision


class OldNews(_Around):
    """As the reference says when it sees the workers as they were up to `seconds` ago. Whether they have room it sees at once."""

    def __init__(self, router: CostRouter, seconds: float) -> None:
        super().__init__(router)
        self.seconds = seconds
        self._seen: dict[str, SimpleNamespace] = {}
        self._when = -seconds

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        if question.now - self._when >= self.seconds:
            self._when = question.now
            self._seen = {worker.worker_id: SimpleNamespace(**{name: getattr(worker, name) for name in SEEN}) for worker in workers}
        for worker in workers:
            self._seen[worker.worker_id].is_open = worker.is_open
        return self.router.choose(question, [self._seen[worker.worker_id] for worker in workers])
