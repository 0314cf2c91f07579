"""What the central scheduler knows of an open request."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from nanopd.core import Request, SamplingParams
from nanopd.messages import Destination, Written
from nanopd.router.routing import Route
from nanopd.router.timeline import Timeline

# What a worker is asked that only computes a prompt again: nothing here can end with the first token, which is known.
RECOMPUTE = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


class Stage(Enum):
    """Where a request is on its way."""

    QUEUED = "queued"
    RESERVING = "reserving"
    PREFILL = "prefill"
    DECODE = "decode"  # also a collocated request, from the start
    CLOSED = "closed"


@dataclass(eq=False)
class Entry:
    """One open request. Each attempt to serve it is a job with an id of its own, so that what is still said about an
    earlier one can be told apart."""

    request: Request
    mode: str
    ticket: int  # its place in line, also after a retry
    answers: dict[int, Written]  # those that are open, and what has been written of each
    timeline: Timeline = field(default_factory=Timeline)
    failures: list[str] = field(default_factory=list)  # what became of earlier attempts
    # of this attempt:
    hashes: list[int] | None = None  # of its prompt's blocks, once somebody has asked
    stage: Stage = Stage.QUEUED
    server: str = ""  # the worker that decodes it, or was asked to
    prefiller: str = ""
    route: Route | None = None  # where the router said that it is to go
    destination: Destination | None = None
    recomputes: bool = False  # the prefill worker computes the prompt again: what it draws is known already
    was_refused: bool = False
    news_when_asked: int = 0  # see `WorkerState`

    @property
    def job(self) -> str:
        request_id = self.request.request_id
        return f"{request_id}/{len(self.failures)}" if self.failures else request_id

    @property
    def job_request(self) -> Request:
        """The request as workers know it."""
        return replace(self.request, request_id=self.job) if self.failures else self.request

    @property
    def prefill_request(self) -> Request:
        """What is asked of a prefill worker."""
        return replace(self.job_request, sampling=RECOMPUTE, beam=None) if self.recomputes else self.job_request

    @property
    def begun(self) -> bool:
        """Whether something is written. A beam search says nothing until it is over."""
        return any(answer.token_ids for answer in self.answers.values())

    def written(self) -> list[Written]:
        """A copy of what there is of the open answers."""
        return [replace(answer, token_ids=list(answer.token_ids), logprobs=list(answer.logprobs))
                for answer in self.answers.values()]

    def fail(self, what: str) -> None:
        """This attempt came to nothing: the next one begins in line."""
        self.failures.append(what)
        self.stage, self.route, self.destination = Stage.QUEUED, None, None
        self.recomputes = self.was_refused = False
