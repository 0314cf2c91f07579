"""Workers for a router to look at, as a test says they are."""

from __future__ import annotations

from dataclasses import dataclass

from nanopd.cost_model.analytical import NOTHING, StepWork
from nanopd.router.routing import Question


@dataclass
class FakeView:
    worker_id: str
    is_open: bool = True
    queued: StepWork = NOTHING
    queued_since: float = 0.0
    running: StepWork = NOTHING
    seats: int | None = None
    free_seats: int = 64
    free_tokens: int = 100_000
    sending_tokens: int = 0
    prompts_per_second: tuple[float, float] = (0.0, 0.0)
    cached_tokens: int = 0
    device: str | None = None

    def __post_init__(self):
        self.role = self.worker_id[0]
        self.seats = self.running.decodes if self.seats is None else self.seats


def views(names, **by_worker):
    """"C0 P0 D0", and what is to be set of some of them: C0=dict(seats=3)."""
    return [FakeView(name, **by_worker.get(name, {})) for name in names.split()]


def writes(answers, context=1000):
    """So many answers are written, with so many tokens each."""
    return dict(running=StepWork(0, 0.0, answers, answers * context))


def question(prompt_len=1000, max_tokens=512, min_tokens=0, num_answers=1, written=0, arrival=10.0, now=10.0):
    return Question("q", prompt_len, max_tokens, min_tokens, num_answers, written, arrival, now)
