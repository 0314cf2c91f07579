"""What a router is asked and what it answers. To write one of your own, write a class with `choose`. No torch.

    class Nearest:
        def choose(self, question, workers):
            open_ones = [worker for worker in workers if worker.role == "C" and worker.is_open]
            return Decision(Route.collocated(open_ones[0].worker_id)) if open_ones else None
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nanopd.cost_model.analytical import StepWork


@dataclass(frozen=True, slots=True)
class Route:
    """The workers of a request: who computes the prompt, and who writes the answer."""

    prefill: str
    decode: str

    @classmethod
    def collocated(cls, worker_id: str) -> Route:
        return cls(worker_id, worker_id)

    @property
    def mode(self) -> str:
        return "collocated" if self.prefill == self.decode else "disaggregated"

    def __str__(self) -> str:
        return self.prefill if self.prefill == self.decode else f"{self.prefill} -> {self.decode}"


@dataclass(frozen=True, slots=True)
class Question:
    """A request that is to be sent on its way, now. Lengths in tokens, times in seconds by the central scheduler's clock."""

    request_id: str
    prompt_len: int
    max_tokens: int  # the longest that an answer may get
    num_answers: int
    written: int  # tokens of the answer that there are, of an attempt that failed; they are computed again with the prompt
    arrival: float
    now: float


class WorkerView(Protocol):
    """A worker as the central scheduler believes it to be: from what it was sent, and what it has said."""

    worker_id: str
    role: str  # "C", "P" or "D"
    device: str | None  # such as "cuda:0"; None where it is not known
    is_open: bool  # whether it may be given this request: it lives, is not about to change its role, and has room
    queued: StepWork  # prompts that it was given and has not begun to answer
    queued_since: float  # when the first of them began to be computed, as far as is known
    running: StepWork  # a step of all that it decodes now
    free_tokens: int  # room in its cache, those it was promised taken off
    cached_tokens: int  # of this request's prompt, that it has computed before and may still have


@dataclass(frozen=True)
class Decision:
    """Where a request goes; where that was reckoned, with the scores of all that it could have been, the best first."""

    route: Route
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Score:
    """What one route is expected to cost.

    `terms` are seconds by name, and make up `ttft` and `e2e`. `objective` is what is compared, the less the better.
    """

    route: Route
    terms: dict[str, float]
    ttft: float
    tpot: float
    e2e: float
    objective: float


class Router(Protocol):
    """Chooses the workers of each request of an adaptive cluster."""

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        """None: it waits in line, and so do those behind it; the router is asked again when something has changed."""
