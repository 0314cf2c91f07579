"""The reference router where an SLO is set and collocated workers are many: the planner shares out parts among them, and within
these each request goes where it costs least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanopd.config import SLO
from nanopd.cost_model.analytical import CostModel
from nanopd.router.cost_router import CostRouter
from nanopd.router.length_predictor import LengthPredictor
from nanopd.router.planner import Planner, WorkerSize
from nanopd.router.role_keeper import RoleKeeper
from nanopd.router.routing import Decision, Question, WorkerView


class PlanningRouter(CostRouter):
    """See the module. `size`: what one worker takes; `options` are CostRouter's."""

    def __init__(self, cost: CostModel, predictor: LengthPredictor, slo: SLO, size: WorkerSize, **options: Any) -> None:
        super().__init__(cost, predictor, slo, chunk_tokens=size.max_num_batched_tokens, **options)
        self.keeper = RoleKeeper(Planner(cost, size, slo), lambda question: self._length(question).mean)
        self._last = ""  # request that was asked about: one that waits is asked about again

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        if question.request_id != self._last:
            self._last = question.request_id
            self.keeper.arrived(question)
        self.parts = self.keeper.parts(question.now, workers)
        return super().choose(question, workers)
