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

ASKED = 1024  # requests that are remembered, to count each once


class PlanningRouter(CostRouter):
    """See the module. `size`: what one worker takes; `options` are CostRouter's."""

    def __init__(self, cost: CostModel, predictor: LengthPredictor, slo: SLO, size: WorkerSize, **options: Any) -> None:
        super().__init__(cost, predictor, slo, chunk_tokens=size.max_num_batched_tokens, **options)
        self.keeper = RoleKeeper(Planner(cost, size, slo), lambda question: self._length(question).mean)
        self._asked: dict[str, None] = {}  # about the latest requests: one that waits, or was refused, is asked about again

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        if question.request_id not in self._asked:
            self._asked[question.request_id] = None
            if len(self._asked) > ASKED:
                del self._asked[next(iter(self._asked))]
            self.keeper.arrived(question)
        self.parts = self.keeper.parts(question.now, workers)
        return super().choose(question, workers)
