"""Routers to compare with, from no thought to a little; and routers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from nanopd.config import SLO, ConfigError
from nanopd.cost_model.analytical import CostModel
from nanopd.cost_model.seed import SeedModel, seed_preset
from nanopd.router.cost_router import CostRouter
from nanopd.router.length_predictor import BayesianLengthPredictor, LengthPredictor
from nanopd.router.planner import WorkerSize
from nanopd.router.planning_router import PlanningRouter
from nanopd.router.routing import Decision, Question, Route, Router, WorkerView


def least_loaded(workers: Iterable[WorkerView], role: str) -> WorkerView | None:
    """The open worker of a role with the fewest answers to write, and then the fewest tokens of prompts to compute."""
    return min((worker for worker in workers if worker.role == role and worker.is_open), default=None,
               key=lambda worker: (worker.seats, worker.queued.prompt_tokens))


def collocated(workers: Sequence[WorkerView]) -> Decision | None:
    """The least loaded collocated worker."""
    worker = least_loaded(workers, "C")
    return worker and Decision(Route.collocated(worker.worker_id))


def disaggregated(workers: Sequence[WorkerView]) -> Decision | None:
    """The least loaded prefill worker, and the least loaded decode worker."""
    prefill, decode = least_loaded(workers, "P"), least_loaded(workers, "D")
    return Decision(Route(prefill.worker_id, decode.worker_id)) if prefill and decode else None


class AlwaysCollocated:
    """Where there is a collocated worker. It waits for one rather than to go elsewhere."""

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        return collocated(workers) if _has(workers, "C") else disaggregated(workers)


class AlwaysDisaggregated:
    """Where there are a prefill and a decode worker. It waits for them rather than to go elsewhere."""

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        return disaggregated(workers) if _has(workers, "P", "D") else collocated(workers)


class Threshold:
    """Prompts of at least `prompt_tokens` go to the prefill workers, shorter ones do not; unless only the other way is open."""

    def __init__(self, prompt_tokens: int = 512) -> None:
        if not (isinstance(prompt_tokens, int) and prompt_tokens >= 0):
            raise ConfigError(f"prompt_tokens must be a whole number of at least 0, got {prompt_tokens!r}")
        self.prompt_tokens = prompt_tokens

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        if question.prompt_len >= self.prompt_tokens:
            return disaggregated(workers) or collocated(workers)
        return collocated(workers) or disaggregated(workers)


class RoundRobin:
    """One pipeline after the other in turn, and in each the least loaded workers; the other where one is not open."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        first, second = (collocated, disaggregated) if self._turn % 2 == 0 else (disaggregated, collocated)
        decision = first(workers) or second(workers)
        self._turn += decision is not None
        return decision


class SeedPolicy:
    """The earlier system's rule: disaggregate where gamma / transfer_rate > batch_thresh / load, whatever the prompt."""

    def __init__(self, model: SeedModel) -> None:
        self.model = model

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        load = sum(worker.running.decodes for worker in workers)
        if self.model.prefers_disaggregated(load):
            return disaggregated(workers) or collocated(workers)
        return collocated(workers) or disaggregated(workers)


def _has(workers: Iterable[WorkerView], *roles: str) -> bool:
    return {worker.role for worker in workers}.issuperset(roles)


# ------------------------------------------------------------------------------------------------ by name


def _cost(cost: CostModel | None, predictor: LengthPredictor | None, slo: SLO | None, size: WorkerSize | None) -> Router:
    if cost is None:
        raise ConfigError("the router 'cost' needs a cost model: give a profile")
    predictor = predictor or BayesianLengthPredictor()
    if slo is not None and size is not None:
        return PlanningRouter(cost, predictor, slo, size, message_seconds=2 * cost.message_seconds)
    return CostRouter(cost, predictor, slo, chunk_tokens=size and size.max_num_batched_tokens,
                      message_seconds=2 * cost.message_seconds)


ROUTERS: dict[str, Callable[..., Router]] = {
    "cost": _cost,
    "collocated": lambda *_: AlwaysCollocated(),
    "disaggregated": lambda *_: AlwaysDisaggregated(),
    "threshold": lambda *_: Threshold(),
    "round-robin": lambda *_: RoundRobin(),
    "seed": lambda *_: SeedPolicy(seed_preset("rtx-4090")),
}


def make_router(name: str, cost: CostModel | None = None, *, predictor: LengthPredictor | None = None, slo: SLO | None = None,
                size: WorkerSize | None = None) -> Router:
    """A router by its name. What it has no use for is left aside.

    Args:
        cost: what steps and transfers take; "cost" needs it.
        size: what each worker takes.

    Raises ConfigError for a name that is not known, or where something is missing.
    """
    if name not in ROUTERS:
        raise ConfigError(f"unknown router {name!r}; there are {', '.join(ROUTERS)}, or give an object with a method choose()")
    return ROUTERS[name](cost, predictor, slo, size)
