"""A runner that computes nothing: its steps and transfers take the time that a cost model says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple, Protocol

from nanopd.config import ConfigError
from nanopd.core import PlanRow, RowResult, Sequence, StepPlan, StepResult
from nanopd.cost_model.analytical import CostModel, StepWork
from nanopd.engine.engine import OnLayer
from nanopd.simulator.clock import VirtualClock

TOKEN, END = 0, 1  # what draws give: one that goes on, and the one that ends an answer


class LinkCosts(NamedTuple):
    """Of KV on its way from one worker to another, in seconds. Sends follow one another, but for the latency."""

    latency: float
    token: float  # for each token, all layers


class StepCosts(Protocol):
    """How long things take, in seconds."""

    def step_seconds(self, work: StepWork) -> float:
        """A step that holds so much."""

    def link(self, source: str, destination: str) -> LinkCosts:
        """From one device to another, such as "cuda:0"."""


@dataclass(frozen=True)
class LinearCosts:
    """The simplest costs, each in seconds: so much for every step, and for every token that it runs or reads.

    Raises ConfigError for one that is below 0.
    """

    step: float = 0.0
    prefill_token: float = 0.0
    decode_row: float = 0.0
    context_token: float = 0.0  # for each token in the cache of a row that decodes
    latency: float = 0.0  # of every transfer
    transfer_token: float = 0.0

    def __post_init__(self) -> None:
        for name, seconds in asdict(self).items():
            if not (seconds >= 0 and math.isfinite(seconds)):
                raise ConfigError(f"{name} must be a number of seconds of at least 0, got {seconds!r}")

    def step_seconds(self, work: StepWork) -> float:
        return (self.step + self.prefill_token * work.prompt_tokens + self.decode_row * work.decodes
                + self.context_token * (work.context_tokens - work.decodes))

    def link(self, source: str, destination: str) -> LinkCosts:
        return LinkCosts(self.latency, self.transfer_token)


@dataclass(frozen=True)
class ModelCosts:
    """What a measured cost model says."""

    cost: CostModel

    def step_seconds(self, work: StepWork) -> float:
        return self.cost.step_seconds(work)

    def link(self, source: str, destination: str) -> LinkCosts:
        """Raises CostModelError where no transfers were measured."""
        found = self.cost.transfer(source, destination)
        return LinkCosts(found.latency_seconds, self.cost.shape.kv_bytes_per_token / found.bytes_per_second)


class CostRunner:
    """Puts its worker's clock forward by what each step costs. Layers take equal shares of a step.

    Answers end by themselves, each at its length in `output_lens`, which nobody else knows.
    """

    def __init__(self, costs: StepCosts, clock: VirtualClock, num_layers: int, output_lens: Mapping[str, int]) -> None:
        self.costs = costs
        self.clock = clock
        self.num_layers = num_layers
        self.output_lens = output_lens  # by request id
        self.busy = 0.0  # seconds spent in steps

    def execute(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        return self._run(plan, self.clock.now, on_layer)

    def last_len(self, sequence: Sequence) -> int:
        """How many tokens, prompt and answer, it will have."""
        return min(sequence.prompt_len + self.output_lens[sequence.request_id], sequence.max_len)

    def _run(self, plan: StepPlan, start: float, on_layer: OnLayer | None) -> StepResult:
        seconds = self.costs.step_seconds(StepWork.of(plan.rows))
        if on_layer is not None:
            for layer in range(self.num_layers):
                self.clock.now = start + seconds * (layer + 1) / self.num_layers
                on_layer(layer)
        self.clock.now = start + seconds
        self.busy += seconds
        return StepResult([self._draw(row) for row in plan.rows], seconds)

    def _draw(self, row: PlanRow) -> RowResult:
        output_len = row.num_cached + row.num_new + 1 - row.sequence.prompt_len  # with what is drawn
        token_id = END if output_len >= self.output_lens[row.request.request_id] else TOKEN
        return RowResult([token_id] * row.num_draws, [0.0] * row.num_draws)


class LaunchingCostRunner(CostRunner):
    """A device that works on its own, as GPUs do: a step is given to it while the one before it runs, and a request that comes
    meanwhile is in the one after."""

    free = 0.0  # when it will have done all it was given

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Callable[[], StepResult]:
        now = self.clock.now
        result = self._run(plan, max(now, self.free), on_layer)
        self.free, self.clock.now = self.clock.now, now
        return partial(self._wait, self.free, result)

    def _wait(self, end: float, result: StepResult) -> StepResult:
        self.clock.now = max(self.clock.now, end)
        return result
