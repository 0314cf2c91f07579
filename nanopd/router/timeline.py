"""When a request got where, and through which workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanopd.router.routing import Decision, Question


@dataclass
class Timeline:
    """The way of one request. Times in seconds, monotonic clock."""

    path: list[str] = field(default_factory=list)  # worker ids, in order
    jobs: list[str] = field(default_factory=list)  # by which name workers knew it: one for each attempt
    marks: list[tuple[str, float]] = field(default_factory=list)  # (what happened, when)
    num_refusals: int = 0
    first_token: float | None = None
    ends: list[tuple[int, float]] = field(default_factory=list)  # (tokens, when) of each answer
    question: Question | None = None  # what the router was asked last, and what it said then
    decision: Decision | None = None

    def mark(self, what: str, when: float) -> None:
        self.marks.append((what, when))

    def __str__(self) -> str:
        return " -> ".join(self.path)
