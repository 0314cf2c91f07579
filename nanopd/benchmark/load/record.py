"""What a client saw of its request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["open", "completed", "failed", "dropped"]


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
    status: Status = "open"  # failed: it ended with an error; dropped: it was refused, for there were too many
    error: str | None = None
    mode: str = ""  # the pipeline it went through, where the client can know: "collocated" or "disaggregated"
    tokens: list[float] = field(default_factory=list)  # when each came

    @property
    def lateness(self) -> float:
        """By how much later than due it was sent."""
        return self.sent - self.arrival

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None

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
