"""The seed's figures beside ours. Its numbers, where they come from and how conditions differ are data, in seed.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanopd.benchmark.load.run import RunRecord
from nanopd.benchmark.report.runs import chosen, source_of, source_of_report
from nanopd.benchmark.results import Report
from nanopd.config import Topology
from nanopd.widgets.strings import pick

DATA = Path(__file__).parent / "seed.json"
Load = Callable[[str], Report]  # by the benchmark's name; raises FileNotFoundError


@dataclass(frozen=True)
class Comparison:
    """A figure of the seed and ours. `ours` is None, and so is the ratio, where nothing is recorded; `command` would make it.
    `ratio` is above 1 where ours is better."""

    what: str
    unit: str
    seed: float
    device: str  # that the seed was measured on
    seed_source: str
    ours: float | None
    our_source: str | None
    ratio: float | None
    differs: str
    command: str


def seed_table(load: Load, runs: Sequence[RunRecord] = ()) -> list[Comparison]:
    """A row for each of the seed's figures, in the current language. `load` finds recorded benchmarks, `runs` are a sweep's."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    rows = []
    for row in data["rows"]:
        found = _of_runs(runs, row["ours"]) if row["ours"]["bench"] == "sweep" else _of_report(load, row["ours"])
        ours, source = found or (None, None)
        ratio = ours and (row["value"] / ours if row["lower_is_better"] else ours / row["value"])
        rows.append(Comparison(pick(*row["what"]), row["unit"], row["value"], row["device"], pick(*data["sources"][row["source"]]),
                               ours, source, ratio, pick(*row["differs"]), row["ours"]["command"]))
    return rows


def _of_report(load: Load, ours: dict[str, Any]) -> tuple[float, str] | None:
    """The field of the recorded row that holds all that is asked for."""
    try:
        report = load(ours["bench"])
    except FileNotFoundError:
        return None
    found = [row for row in report.rows if all(row.get(name) == value for name, value in ours["row"].items())]
    return (found[0][ours["field"]], source_of_report(report)) if found else None


def _of_runs(runs: Sequence[RunRecord], ours: dict[str, Any]) -> tuple[float, str] | None:
    """The metric, at the rate where it is the best, of the runs in this mode, on so many GPUs, or in this very topology."""
    found = [run for run in chosen(runs, **ours["settings"]) if run.device["kind"] != "cpu" and run.metrics[ours["field"]] is not None
             and ours.get("topology") in (None, run.settings["topology"])
             and ours.get("gpus") in (None, len(Topology.parse(run.settings["topology"]).devices))]
    if not found:
        return None
    best = (min if ours["best"] == "min" else max)(found, key=lambda run: run.metrics[ours["field"]])
    return best.metrics[ours["field"]] * ours.get("scale", 1), source_of([best])
