"""What `nanopd plan` does: which split of workers serves the most requests in time, by formulas, and the best played through."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from nanopd.config import SLO, CacheConfig, ConfigError, SchedulerConfig
from nanopd.metrics import summarize
from nanopd.router.planner import ATTAINMENT, Mix, Planner, Split, WorkerSize
from nanopd.simulator.command import Workload, poisson_workload, simulate
from nanopd.simulator.hardware import Hardware
from nanopd.simulator.workload import checked as checked_arrivals

if TYPE_CHECKING:
    from rich.console import Console

CHECKED_AT = 0.9  # of the best estimated rate
SECONDS, FEWEST, MOST = 30, 200, 1500  # of arrivals in a simulation, and how many those may be
WARM_UP = 0.2  # share of a simulation's requests that are not counted: they find the workers empty
SAMPLE = 256  # requests that formulas reckon with
ALIKE = 0.01  # attainments that differ by less are as good as each other

Load = Callable[[float], Workload]  # what comes at so many requests a second


@dataclass(frozen=True)
class Way:
    """A way to use the workers."""

    name: str
    estimated: float | None  # requests a second of which 90% meet the SLO; None for adaptive mode, of which no formula tells
    attainment: float | None  # in a simulation at the rate checked; None: not simulated


@dataclass(frozen=True)
class Plan:
    """Ways to use so many workers: splits, the best estimated first, and adaptive mode. `checked` is what came in simulations,
    at `checked_rate` a second; None where there were none."""

    hardware: Hardware
    num_workers: int
    slo: SLO
    ways: list[Way]
    checked_rate: float
    checked: Workload | None
    rate: float | None  # requests a second that are asked about

    @property
    def estimated(self) -> list[tuple[str, float]]:
        return [(way.name, way.estimated) for way in self.ways if way.estimated is not None]

    @property
    def best(self) -> list[Way]:
        """By simulation where there was any, and then all that are alike; else by formulas."""
        if self.checked is None:
            return self.ways[:1]
        most = max(way.attainment for way in self.ways if way.attainment is not None)
        return [way for way in self.ways if way.attainment is not None and way.attainment > most - ALIKE]

    def goodput_per_gpu(self, way: Way) -> float | None:
        """In the simulation: requests a second that came, and met the SLO."""
        return None if way.attainment is None else way.attainment * self.checked_rate / self.num_workers


def poisson_load(prompts: str, outputs: str, seed: int) -> Load:
    """See `poisson_workload`."""
    return lambda rate: poisson_workload(rate, min(max(round(rate * SECONDS), FEWEST), MOST), prompts, outputs, seed)


def trace_load(trace: Workload) -> Load:
    """The same requests in the same rhythm, faster or slower. Raises ConfigError where they have none."""
    own_rate = trace.rate
    if own_rate is None:
        raise ConfigError("all requests of the trace come at the same time, so they have no rate: take more of them")
    return lambda rate: replace(trace, arrivals=[replace(one, time=one.time * own_rate / rate) for one in trace.arrivals])


def plan(hardware: Hardware, num_workers: int, slo: SLO, load: Load, cache: CacheConfig, scheduler: SchedulerConfig, *,
         rate: float | None = None, check: int = 3, progress: Callable[[str], None] = lambda text: None) -> Plan:
    """Rank the splits by formulas; simulate the best few, and adaptive mode, at 90% of the best estimated rate.

    Args:
        rate: requests a second that are asked about.
        check: how many splits are simulated; 0: none, nor adaptive mode.
        progress: is told what is being simulated.

    Raises ConfigError where something can't be, or where no split serves any such request in time.
    """
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise ConfigError(f"rate is a number of requests a second above 0, got {rate!r}")
    if check < 0:
        raise ConfigError(f"check is how many of the best splits are simulated, 0 or more, got {check!r}")
    arrivals = checked_arrivals(load(1.0).arrivals, min(scheduler.max_model_len, cache.num_blocks * cache.block_size))
    mix = Mix(tuple((one.prompt_len, one.output_len) for one in arrivals[:: math.ceil(len(arrivals) / SAMPLE)]))
    size = WorkerSize.of(scheduler, cache.num_blocks, cache.block_size)
    ranked = Planner(hardware.cost, size, slo).rank(num_workers, mix)
    checked_rate = CHECKED_AT * ranked[0][1]
    if checked_rate <= 0:
        raise ConfigError(f"however few come, no split of {num_workers} workers of {hardware.name} is estimated to give {ATTAINMENT:.0%} "
                          f"of such requests their first token within {slo.ttft * 1e3:g} ms and each after it within "
                          f"{slo.tpot * 1e3:g} ms: promise less, shorten the prompts, or take other hardware")
    checked = load(checked_rate) if check else None

    def attainment(name: str, mode: str, workers: Split) -> float:
        progress(f"simulating {name}")
        counts = {role: count for role, count in asdict(workers).items() if count}
        requests = simulate(hardware, counts, mode, checked, cache, scheduler, slo=slo).result.requests
        return summarize(requests[round(WARM_UP * len(requests)):], slo).attainment

    ways = [Way(str(split), estimated, attainment(str(split), _mode(split), split) if place < check else None)
            for place, (split, estimated) in enumerate(ranked)]
    if check:
        ways.append(Way("adaptive", None, attainment("adaptive mode", "adaptive", Split(C=num_workers))))
    return Plan(hardware, num_workers, slo, ways, checked_rate, checked, rate)


def _mode(split: Split) -> str:
    """Where there is a choice, somebody has to make it."""
    return "disaggregated" if not split.C else "adaptive" if split.P else "collocated"


# ---------------------------------------------------------------------------------------------- the table


def show(found: Plan, console: Console) -> None:
    """A table of the ways, and what it means."""
    from rich.table import Table

    console.print(f"[bold]Planned[/]: {found.num_workers} workers of {found.hardware.name}; first token within "
                  f"{found.slo.ttft * 1e3:g} ms, each after it within {found.slo.tpot * 1e3:g} ms", highlight=False)
    titles = ["estimated:\nrequests/s in time", "estimated:\nper GPU"]
    if found.checked:
        titles += ["simulated:\nmet the SLO", "simulated:\ngoodput per GPU"]
    table = Table("workers")
    for title in titles:
        table.add_column(title, justify="right")
    for way in found.ways:
        per_gpu = None if way.estimated is None else way.estimated / found.num_workers
        cells = [_text(way.estimated), _text(per_gpu), _text(way.attainment, ".1%"), _text(found.goodput_per_gpu(way))]
        table.add_row(way.name, *cells[: len(titles)])
    console.print(table)
    for line in _lines(found):
        console.print(line, highlight=False)


def _text(value: float | None, how: str = ",.2f") -> str:
    return "-" if value is None else format(value, how)


def _lines(found: Plan) -> list[str]:
    best, names = found.best[0], ", ".join(way.name for way in found.best)
    lines = [f"Estimated by queueing formulas: the highest rate at which {ATTAINMENT:.0%} meet the SLO."]
    if found.checked:
        lines += [f"Simulated at {found.checked_rate:g} requests a second, {CHECKED_AT:.0%} of the best estimate: "
                  f"{found.checked.what}; the first {WARM_UP:.0%} are not counted.",
                  f"Best, by simulation: {names}; {found.goodput_per_gpu(best):.2f} requests a second in time per GPU"
                  + (f", alike within {ALIKE:.0%}." if len(found.best) > 1 else ".")]
    else:
        lines.append(f"Best, by formulas alone: {names}; {best.estimated / found.num_workers:.2f} requests a second in time per GPU.")
    if found.rate is not None:
        lines.append(_verdict(found, found.rate))
    return [*lines, "Nothing of this was measured: times are what a cost model says.", *(f"({note})" for note in found.hardware.notes)]


def _verdict(found: Plan, rate: float) -> str:
    able = [f"{name} (up to {most:.2f})" for name, most in found.estimated if most >= rate]
    if able:
        return f"{rate:g} requests a second are estimated to be served in time by {', '.join(able)}."
    name, most = found.estimated[0]
    return (f"{rate:g} requests a second are more than any split is estimated to serve in time; the best, {name}, serves "
            f"{most:.2f}: take more workers, or promise less.")
