"""What comes in the cells of a sweep: a workload at a rate, or the same requests of a recorded trace, sped up to that rate."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from nanopd.benchmark.load.run import RunSettings
from nanopd.config import ConfigError
from nanopd.router.planner import Mix
from nanopd.simulator.traces import Trace, read_trace
from nanopd.simulator.workload import Arrival

DRAWN = 256  # requests, about, by which the planner judges a load


def as_recorded(base: RunSettings, path: str, requests: int) -> RunSettings:
    """The first requests of a trace, as fast as they came, or all where it has fewer. Warm-up, window and tail have the shares of them
    that they would have of evenly spaced ones. Raises ConfigError where the trace can't be read, or these come at once."""
    times = [one.time for one in _trace(path, base.max_model_len)]
    number = min(requests, len(times))
    begin, stop, end = (_after(times, round(number * seconds / span(base)))
                        for seconds in (base.warmup, base.warmup + base.window, span(base)))
    if stop <= begin:
        raise ConfigError(f"too many of the first {number} requests of {path} come at once, and none is left for the window: take more")
    return replace(base, trace=path, warmup=begin, window=stop - begin, tail=end - stop)


def _after(times: list[float], number: int) -> float:
    """A moment when so many have come, or more where several come at once."""
    while 0 < number < len(times) and times[number] == times[number - 1]:
        number += 1
    if number == len(times):
        return times[-1] * number / max(1, number - 1)
    return (times[number - 1] + times[number]) / 2 if number else 0.0


def at_rate(source: RunSettings, rate: float) -> RunSettings:
    """So that `rate` requests a second come. Of a trace these are the same requests at each rate, so it lasts as long as they take."""
    if source.trace is None:
        return replace(source, rate=rate)
    factor = rate / rate_of(source)
    return replace(source, speed_up=factor, warmup=source.warmup / factor, window=source.window / factor, tail=source.tail / factor)


def span(cell: RunSettings) -> float:
    """Seconds in which requests come."""
    return cell.warmup + cell.window + cell.tail


def rate_of(cell: RunSettings) -> float:
    """Requests a second."""
    return cell.rate if cell.trace is None else len(_replayed(cell)) / span(cell)


def mix_of(source: RunSettings) -> Mix:
    """A sample of its requests, as long as the workers take. That prompts of a trace begin alike is not taken into account."""
    if source.trace is None:
        sample = replace(source, rate=1.0, warmup=0.0, window=float(DRAWN), tail=0.0, seed=0)
        arrivals = sample.schedule(source.max_model_len).arrivals
    else:
        arrivals = _replayed(source)
    return Mix(tuple((one.prompt_len, one.output_len) for one in arrivals[:: max(1, len(arrivals) // DRAWN)]))


def name_of(cell: RunSettings) -> str:
    return cell.workload if cell.trace is None else Path(cell.trace).stem


def words(cell: RunSettings) -> str:
    sped_up = f" ({cell.speed_up:.3g} times as fast)" if cell.trace else ""
    return f"{name_of(cell)}, {rate_of(cell):.4g}/s{sped_up}"


def _replayed(cell: RunSettings) -> list[Arrival]:
    arrivals = _trace(cell.trace, cell.max_model_len).arrivals
    return arrivals[: bisect_left(arrivals, span(cell) * cell.speed_up, key=lambda one: one.time)]


@lru_cache(maxsize=4)  # read once, for each cell asks for it
def _trace(path: str, max_len: int) -> Trace:
    return read_trace(path).cut_to(max_len)
