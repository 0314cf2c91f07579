"""Time that passes when somebody says so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class VirtualClock:
    """Seconds since the simulation began. Called, it tells the time, as `time.monotonic` does."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now
