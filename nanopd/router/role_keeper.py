"""Gives workers other roles as the load drifts. No torch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace

from nanopd.router.planner import Mix, Planner, Split

REMEMBERED = 64  # of the latest arrivals: the load as it is now
ENOUGH = 16  # of them, to judge by
EVERY = 2.0  # seconds between two judgements
GAIN = 1.1  # times the present split's capacity that another must have: a change costs the time in which a worker empties
BUSY = 0.6  # share of its capacity from which on the present split is in question


class RoleKeeper:
    """Watches what arrives and says which change of role would let the workers serve more of it in time."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._arrivals: deque[tuple[float, float, float]] = deque(maxlen=REMEMBERED)  # when, prompt, expected answer
        self._judged = 0.0

    def arrived(self, now: float, prompt_len: int, answer_len: float) -> None:
        """A request has come, at `now` seconds. Lengths in tokens; that of the answer as it is expected."""
        self._arrivals.append((now, prompt_len, answer_len))

    def advise(self, now: float, roles: Iterable[str]) -> tuple[str, str] | None:
        """(role to take a worker from, role to give it), or None to leave things as they are.

        `roles`: of all workers. One step at a time: the next one is asked for when that worker has changed.
        """
        if now - self._judged < EVERY or len(self._arrivals) < ENOUGH:
            return None
        self._judged = now
        present = Split(**Counter(roles))
        mix = Mix(tuple((prompt, answer) for _, prompt, answer in self._arrivals))
        capacity = self._planner.capacity(present, mix)
        if self._rate(now) < BUSY * capacity:
            return None
        best, best_capacity = self._planner.rank(present.num_workers, mix)[0]
        if best_capacity < GAIN * capacity:
            return None
        steps = _steps(present, best)
        return max(steps, key=lambda step: self._planner.capacity(_after(present, *step), mix)) if steps else None

    def _rate(self, now: float) -> float:
        """Arrivals a second: over the latest, up to now."""
        return len(self._arrivals) / max(now - self._arrivals[0][0], 1e-9)


def _steps(present: Split, wanted: Split) -> list[tuple[str, str]]:
    """Changes of one worker that lead from the one split towards the other."""
    more = {role: getattr(wanted, role) - getattr(present, role) for role in "CPD"}
    return [(giver, taker) for giver in more if more[giver] < 0 for taker in more if more[taker] > 0]


def _after(split: Split, giver: str, taker: str) -> Split:
    return replace(split, **{giver: getattr(split, giver) - 1, taker: getattr(split, taker) + 1})
