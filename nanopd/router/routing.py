"""What a router is asked and what it answers. To write one of your own, write a class with `choose`. No torch.

    class Nearest:
        def choose(self, question, workers):
            open_ones = [worker for worker in workers if worker.role == "C" and worker.is_open]
            return Decision(Route.collocated(open_ones[0].worker_id)) if open_ones else None
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


class Question(NamedTuple):
    """A request that is to be sent on its way, now. Lengths in tokens, times in seconds by the central scheduler's clock."""

    request_id: str
    prompt_len: int
    max_tokens: int  # the longest that an answer may get
    min_tokens: int  # and the shortest; the same where it does not end by itself
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
    seats: int  # answers that it decodes or will, once their prompts are computed
    free_seats: int  # in its batch beside those; below 0 where some of them have to wait for one
    free_tokens: int  # room in its cache, those it was promised taken off
    sending_tokens: int  # of prompts that it has computed, and whose KV has not arrived where it goes
    prompts_per_second: tuple[float, float]  # that it was given lately, and their tokens that were to be computed
    cached_tokens: int  # of this request's prompt, that it has computed before and may still have


@dataclass(frozen=True)
class Decision:
    """Where a request goes; where that was reckoned, with the scores of all that it could have been, the best first."""

    route: Route
    scores: Sequence[Score] = ()


class Score(NamedTuple):
    """What one route is expected to cost, in seconds from the request's arrival.

    `terms` by name: "waited" in line, "queue" at the worker that computes the prompt, "prefill", "transfer" and "handover"
    where another worker goes on, "decode", "interference" by prompts to come; and "others", what the requests there have to
    wait for this one. All but the last make up `e2e`, the first three `ttft`. `objective` is what is compared, the less the
    better.
    """

    route: Route
    terms: dict[str, float]
    ttft: float
    tpot: float
    e2e: float
    objective: float


@dataclass(frozen=True, slots=True)
class Ended:
    """An answer that has ended. `cut`: it would have been longer, for it came to max_tokens or was broken off. Times in seconds
    from the request's arrival to the first token, and for each token after it."""

    request_id: str
    prompt_len: int
    output_len: int
    cut: bool
    ttft: float
    tpot: float | None  # None where there is a single token
    decision: Decision | None  # None where the router was not asked, or an attempt failed


class Router(Protocol):
    """Chooses the workers of each request of an adaptive cluster."""

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        """None: it waits in line, and so do those behind it; the router is asked again when something has changed.

        A router that has a method `ended(answer: Ended)` is told of every answer when it has ended.
        """
