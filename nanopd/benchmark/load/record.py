"""What a client saw of its request."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["open", "completed", "failed", "dropped"]
PHASES = ("queue", "prefill", "transfer", "decode")  # of a request's time, one after the other


@dataclass
class ClientRecord:
    """One request as its client saw it. Times in seconds from the start of the load.

    TTFT and E2E count from `arrival`, when the request was due: a client that is late to send makes its user wait as well.
    """

    arrival: float
    prompt_len: int
    output_len: int  # tokens that were asked for
    counts: bool = True  # it was due within the measured window
    sent: float | None = None  # None until it was
    ended: float | None = None  # in whichever way; None while it is open
    status: Status = "open"  # failed: it ended with an error; dropped: it was refused, for there were too many
    error: str | None = None
    mode: str = ""  # the pipeline it went through, where the client can know: "collocated" or "disaggregated"
    tokens: list[float] = field(default_factory=list)  # when each came; of an endpoint, when each piece of the answer came
    phases: dict[str, float] | None = None  # seconds in each of PHASES, where the client can know
    num_reported: int | None = None  # tokens of the answer as the server counted them, where it said so

    def end(self, now: float, status: Status, error: str | None = None) -> None:
        self.ended, self.status, self.error = now, status, error

    @property
    def lateness(self) -> float:
        """By how much later than due it was sent."""
        return self.sent - self.arrival

    @property
    def num_tokens(self) -> int:
        """Of the answer. A piece may hold several, so the server's count goes before the client's."""
        return len(self.tokens) if self.num_reported is None else self.num_reported

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token."""
        return (self.tokens[-1] - self.tokens[0]) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """The gaps between its tokens, after the first."""
        return [after - before for before, after in zip(self.tokens, self.tokens[1:])]

    @property
    def e2e(self) -> float:
        return self.tokens[-1] - self.arrival


@dataclass(frozen=True)
class Load:
    """A load that was served: each of its requests in the order of their arrival, and the measured window in seconds."""

    records: list[ClientRecord]
    begin: float
    end: float

    @property
    def counted(self) -> list[ClientRecord]:
        """Those that were due within the window."""
        return [record for record in self.records if record.counts]

    @property
    def until(self) -> float:
        """Where the window ends: with the last arrival, where it has no end of its own."""
        return self.end if math.isfinite(self.end) else max((record.arrival for record in self.records), default=self.begin)

    def so_far(self, now: float) -> Load:
        """What has been sent of it, when it is over before its time."""
        return Load([record for record in self.records if record.sent is not None], self.begin, min(self.end, max(self.begin, now)))


@dataclass(frozen=True)
class Tally:
    """How far a load is, `seconds` after its start. Sent are all but those that are not due yet."""

    seconds: float
    total: int
    sent: int
    open: int

    @property
    def ended(self) -> int:
        return self.sent - self.open


class Stopped(KeyboardInterrupt):
    """Somebody pressed Ctrl-C. `load` holds what had been sent by then; what was still open of it has failed."""

    def __init__(self, load: Load) -> None:
        super().__init__("the load was stopped")
        self.load = load
