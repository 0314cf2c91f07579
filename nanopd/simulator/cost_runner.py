"""A runner that computes nothing: its steps and transfers take the time that a cost model says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Protocol

from nanopd.config import ConfigError
from nanopd.core import PlanRow, RowResult, StepPlan, StepResult
from nanopd.engine.engine import OnLayer
from nanopd.simulator.clock import VirtualClock

TOKEN = 0  # what every draw gives: how long an answer gets is for its request to say


class StepCosts(Protocol):
    """How long things take, in seconds."""

    def step_seconds(self, rows: Sequence[PlanRow]) -> float:
        """A step with these rows: each runs `num_new` tokens after `num_cached`."""

    def transfer_seconds(self, num_tokens: int) -> float:
        """The KV of so many tokens, all layers, from one worker to another. Of 0 tokens: the latency, with which other sends
        are not held up."""


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

    def step_seconds(self, rows: Sequence[PlanRow]) -> float:
        seconds = self.step
        for row in rows:
            if row.num_new == 1:
                seconds += self.decode_row + self.context_token * row.num_cached
            else:
                seconds += self.prefill_token * row.num_new
        return seconds

    def transfer_seconds(self, num_tokens: int) -> float:
        return self.latency + self.transfer_token * num_tokens


class CostRunner:
    """Puts its worker's clock forward by what each step costs. Layers take equal shares of a step."""

    def __init__(self, costs: StepCosts, clock: VirtualClock, num_layers: int) -> None:
        self.costs = costs
        self.clock = clock
        self.num_layers = num_layers
        self.busy = 0.0  # seconds spent in steps

    def execute(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        return self._run(plan, self.clock.now, on_layer)

    def _run(self, plan: StepPlan, start: float, on_layer: OnLayer | None) -> StepResult:
        seconds = self.costs.step_seconds(plan.rows)
        if on_layer is not None:
            for layer in range(self.num_layers):
                self.clock.now = start + seconds * (layer + 1) / self.num_layers
                on_layer(layer)
        self.clock.now = start + seconds
        self.busy += seconds
        return StepResult([_draw(row) for row in plan.rows], seconds)


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


def _draw(row: PlanRow) -> RowResult:
    return RowResult([TOKEN] * row.num_draws, [0.0] * row.num_draws)
