"""Which requests are due when, and which of them count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from nanopd.benchmark.load.record import ClientRecord
from nanopd.config import ConfigError
from nanopd.simulator.traces import Trace
from nanopd.simulator.workload import Arrival, Lengths, poisson_forever


@dataclass(frozen=True)
class Schedule:
    """Requests in the order of their arrival. Those that come from `begin` on and before `end`, in seconds, count; the ones
    before them warm the server up, the ones after them keep it busy while the last that count are answered."""

    arrivals: Sequence[Arrival]
    begin: float
    end: float
    num_cut: int = 0  # of the requests are shorter than they were recorded

    def records(self) -> list[ClientRecord]:
        """One for each request, as nobody has sent any of them yet."""
        return [ClientRecord(one.time, one.prompt_len, one.output_len, self.begin <= one.time < self.end) for one in self.arrivals]

    def cut_to(self, max_len: int) -> Schedule:
        """So that prompt and answer have at most `max_len` tokens together, see `Trace.cut_to`."""
        cut = Trace("a schedule", list(self.arrivals), self.num_cut).cut_to(max_len)
        return replace(self, arrivals=cut.arrivals, num_cut=cut.num_cut)


def poisson_schedule(rate: float, lengths: Lengths, window: float, warmup: float = 0.0, tail: float = 0.0, seed: int = 0,
                     burstiness: float = 1.0) -> Schedule:
    """`rate` requests a second for `warmup` + `window` + `tail` seconds. The same for each seed, whoever serves them.

    `burstiness`: 1 for a Poisson process; below 1 requests come in bursts, above it more evenly (gaps of a Gamma
    distribution of this shape). Raises ConfigError for spans that are no numbers of seconds.
    """
    end = _checked(warmup, window, tail)
    return Schedule(_until(end, poisson_forever(rate, lengths, seed, burstiness)), warmup, warmup + window)


def trace_schedule(arrivals: Iterable[Arrival], window: float | None = None, warmup: float = 0.0, tail: float = 0.0) -> Schedule:
    """A recorded workload's first `warmup` + `window` + `tail` seconds; without a window all that come after the warming up
    count. Raises ConfigError for spans that are no numbers of seconds."""
    end = _checked(warmup, math.inf if window is None else window, tail)
    return Schedule(_until(end, arrivals), warmup, end - tail if window is not None else math.inf)


def _until(end: float, arrivals: Iterable[Arrival]) -> list[Arrival]:
    return list(takewhile(lambda arrival: arrival.time < end, arrivals))


def _checked(warmup: float, window: float, tail: float) -> float:
    if not window > 0:
        raise ConfigError(f"window is a number of seconds above 0, got {window!r}")
    for name, span in (("warmup", warmup), ("tail", tail)):
        if not (span >= 0 and math.isfinite(span)):
            raise ConfigError(f"{name} is a number of seconds of at least 0, got {span!r}")
    return warmup + window + tail
