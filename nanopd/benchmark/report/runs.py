"""Runs of the load generator as figures need them: by way of using the GPUs, by workload, by rate, seeds taken together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanopd.benchmark.load.run import RunRecord
from nanopd.benchmark.report.style import MODE_COLOURS, MORE_COLOURS
from nanopd.benchmark.report.words import w
from nanopd.benchmark.results import Report
from nanopd.config import MODES, Topology
from nanopd.metrics import quantile

PROFILE = "profile.json"  # lies beside the cells that were made by it
ENDPOINT = "endpoint"  # stands for the mode of a server of which no more is known
WAYS = (*MODES, ENDPOINT)
RESAMPLES = 400
CONFIDENCE = 0.95
NORMAL_95 = 1.96


class Way(NamedTuple):
    """What was done with the GPUs."""

    mode: str
    topology: str


class Band(NamedTuple):
    """An estimate, and between which bounds 95% of such estimates lie."""

    value: float
    low: float
    high: float


def load_runs(folder: str | Path) -> list[RunRecord]:
    """The finished cells of a sweep in which any request counted, in the order of mode, topology, workload, rate and seed. Raises
    FileNotFoundError for none."""
    read = [RunRecord.load(path) for path in sorted(Path(folder).glob("*.json")) if path.name != PROFILE]
    found = [_placed(run) for run in read if run.requests["arrival"]]
    if not found:
        raise FileNotFoundError(f"no cells of a sweep in {folder}: make some with `nanopd bench sweep --out {folder}`")
    return sorted(found, key=lambda run: (WAYS.index(run.settings["mode"]), *(
        run.settings[name] for name in ("topology", "workload", "rate", "seed"))))


def _placed(run: RunRecord) -> RunRecord:
    """With a way, a workload and a rate also where it was a server somewhere that answered, or a trace that was replayed."""
    settings = dict(run.settings)
    if settings["endpoint"] is not None:
        settings |= {"mode": ENDPOINT, "topology": settings["endpoint"]}
    if settings["trace"] is not None:
        arrivals = run.requests["arrival"]
        seconds = settings["window"] or max(arrivals, default=0.0) - min(arrivals, default=0.0)
        settings |= {"workload": Path(settings["trace"]).stem, "rate": float(f"{len(arrivals) / seconds:.3g}") if seconds else 0.0}
    return replace(run, settings=settings)


def source_of(runs: Sequence[RunRecord]) -> str:
    """Device, date and commit, in a line."""
    models, devices, commits = (_list(map(part, runs)) for part in (lambda run: run.settings["model"], _device, _commit))
    dates = sorted({run.date[:10] for run in runs})
    return f"{models}, {devices}, {' – '.join(dict.fromkeys((dates[0], dates[-1])))}, {commits}, {w('stamp.runs', runs=len(runs))}"


def source_of_report(report: Report) -> str:
    """`Report.source` in the current language."""
    commit = w("stamp.commit", commit=report.commit[:7]) if report.commit else w("stamp.no_commit")
    return f"{report.device['name']}, {report.date[:10]}, {commit}{' ' + w('stamp.changes') if report.dirty else ''}"


def _device(run: RunRecord) -> str:
    if run.settings["mode"] == ENDPOINT:
        return run.device["name"]
    if run.device["kind"] == "cpu":
        return f"CPU ({run.device['cpu']}; {w('stamp.cpu')})"
    return f"{num_gpus(run)} × {run.device['name']}"


def num_gpus(run: RunRecord) -> int | None:
    """That served it; on the CPU each worker stands for one. None where that is not known."""
    if run.settings["mode"] == ENDPOINT:
        return None
    topology = Topology.parse(run.settings["topology"])
    return len(topology.placements if topology.devices == ["cpu"] else topology.devices)


def by_gpus(runs: Sequence[RunRecord]) -> dict[int, list[RunRecord]]:
    """Runs that can be compared; those of which the number is not known with all."""
    numbers = sorted({number for run in runs if (number := num_gpus(run))}) or [0]
    return {number: [run for run in runs if num_gpus(run) in (number, None)] for number in numbers}


def _commit(run: RunRecord) -> str:
    if not run.commit:
        return w("stamp.no_commit")
    return w("stamp.commit", commit=run.commit[:7]) + (f" {w('stamp.changes')}" if run.dirty else "")


def _list(parts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(parts))


# ---------------------------------------------------------------------------------------------------- choosing


def way_of(run: RunRecord) -> Way:
    return Way(run.settings["mode"], run.settings["topology"])


def ways_of(runs: Iterable[RunRecord]) -> list[Way]:
    """Each once, collocated first."""
    return sorted({way_of(run) for run in runs}, key=lambda way: (WAYS.index(way.mode), way.topology))


def values_of(runs: Iterable[RunRecord], setting: str) -> list:
    """Of a setting, each once, in order."""
    return sorted({run.settings[setting] for run in runs})


def chosen(runs: Iterable[RunRecord], way: Way | None = None, **settings: object) -> list[RunRecord]:
    """Those of a way, and with these settings."""
    return [run for run in runs if way in (None, way_of(run))
            and all(run.settings[name] == value for name, value in settings.items())]


def label_of(way: Way, ways: Sequence[Way]) -> str:
    """The mode's name; with the roles, where several ways are of this mode."""
    alike = [other for other in ways if other.mode == way.mode]
    if way.mode == ENDPOINT:
        return w("endpoint", url=way.topology)
    if len(alike) == 1:
        return w(way.mode)
    roles = Counter(placement.role for placement in Topology.parse(way.topology).placements)
    return f"{w(way.mode)} {' '.join(f'{count}{role}' for role, count in sorted(roles.items(), key=lambda each: 'CPD'.index(each[0])))}"


def colour_of(way: Way, ways: Sequence[Way]) -> str:
    """The mode's; the second and third way of a mode have their own."""
    extra = [other for mode in WAYS for other in [each for each in ways if each.mode == mode][mode in MODES:]]
    return MORE_COLOURS[extra.index(way) % len(MORE_COLOURS)] if way in extra else MODE_COLOURS[way.mode]


# --------------------------------------------------------------------------------------------------- reckoning


def column(runs: Iterable[RunRecord], name: str) -> list:
    """Of all requests of these runs that have it."""
    return [value for run in runs for value in run.requests[name] if value is not None]


def quantile_band(values: Sequence[float], share: float, seed: int = 0) -> Band:
    """A quantile, and what resampling makes of it. Raises ValueError for no values."""
    if not values:
        raise ValueError("there is no quantile of no values")
    data = np.asarray(values)
    drawn = np.quantile(np.random.default_rng(seed).choice(data, (RESAMPLES, len(data))), share, axis=1, method="inverted_cdf")
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Band(quantile(values, share), float(low), float(high))


def goodput_band(runs: Sequence[RunRecord]) -> Band:
    """Requests a second that met the SLO, by all these runs together: of as many as counted, the share that met it, with
    Wilson's interval. Requests that meet each other in a queue fare alike, so the truth may lie farther out."""
    met = sum(run.metrics["request_goodput"] * run.metrics["duration"] for run in runs)
    number = sum(num_counted(run) for run in runs)
    scale = number / sum(run.metrics["duration"] for run in runs)
    low, high = wilson(met / number, number)
    return Band(scale * met / number, scale * low, scale * high)


def num_counted(run: RunRecord) -> int:
    return sum(run.metrics[status] for status in ("completed", "failed", "dropped"))


def wilson(share: float, number: int) -> tuple[float, float]:
    """Between which shares the true one lies in 95 of 100 cases."""
    spread = NORMAL_95 ** 2 / number
    middle = (share + spread / 2) / (1 + spread)
    half = NORMAL_95 / (1 + spread) * math.sqrt(share * (1 - share) / number + spread / (4 * number))
    return max(0.0, middle - half), min(1.0, middle + half)


def by_rate(runs: Sequence[RunRecord], reckon: Callable[[list[RunRecord]], Band]) -> list[Band]:
    """What is reckoned of the runs at each rate."""
    return [reckon(chosen(runs, rate=rate)) for rate in values_of(runs, "rate")]
