"""Axes of a picture: from values to pixels, and where to write numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PADDING = 0.04  # of the range, beyond the outermost values
LEAST_DECADES = 0.6  # of a logarithmic axis


@dataclass(frozen=True)
class Scale:
    """From `low` at pixel `start` to `high` at pixel `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __str__(self) -> str:
        return f"{'log' if self.is_log else 'linear'} {self.low:.9g} {self.high:.9g} {self.start:.3f} {self.end:.3f}"

    def at(self, value: float) -> float:
        """Its pixel. On a logarithmic axis values that are not above 0 lie at its lower end."""
        if self.is_log:
            value = max(value, self.low)
        share = (self._place(value) - self._place(self.low)) / (self._place(self.high) - self._place(self.low))
        return self.start + share * (self.end - self.start)

    def _place(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def ticks(self, count: int) -> list[float]:
        """Round numbers within the range, about so many."""
        return self._log_ticks(count) if self.is_log else self._linear_ticks(count)

    def _linear_ticks(self, count: int) -> list[float]:
        rough = abs(self.high - self.low) / max(1, count)
        decade = 10.0 ** math.floor(math.log10(rough))
        step = next(times * decade for times in (1, 2, 5, 10) if times * decade >= rough)
        low, high = sorted((self.low, self.high))
        return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        within = [[times * 10.0 ** decade for decade in range(low, high + 1) for times in series
                   if self.low * (1 - 1e-9) <= times * 10.0 ** decade <= self.high * (1 + 1e-9)] for series in ((1,), (1, 2, 5))]
        decades, finer = within
        return finer if len(decades) < 3 and len(finer) <= 2 * count else decades


def spread(values: Sequence[float], is_log: bool, to_zero: bool, is_padded: bool = True) -> tuple[float, float]:
    """The range of an axis that shows these values."""
    if is_log:
        logs = [math.log10(value) for value in values if value > 0] or [0.0]
        low, high = min(logs), max(logs)
        lacks = max(0.0, LEAST_DECADES - (high - low)) / 2 + PADDING * (high - low)
        return 10 ** (low - lacks), 10 ** (high + lacks)
    low, high = min(values, default=0.0), max(values, default=1.0)
    if to_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = low - (0.0 if to_zero else 0.5), high + 0.5
    pad = PADDING * (high - low) if is_padded else 0.0
    return low if to_zero and low == 0 else low - pad, high + pad


def number(value: float, tickformat: str | None = None) -> str:
    """As it is written at an axis."""
    if tickformat:
        return format(value, tickformat)
    return f"{value:,.6g}"
