"""Options of `nanopd bench sweep` and `nanopd bench report`."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanopd.benchmark.load.command import positive
from nanopd.benchmark.load.run import RunRecord
from nanopd.benchmark.load.workloads import NAMES
from nanopd.benchmark.results import RECORDED
from nanopd.benchmark.sweep import (
    CASES,
    MODES,
    Case,
    Grid,
    Known,
    Pace,
    Store,
    known_profile,
    lines,
    measure,
    needs_profile,
    plan,
    run,
)
from nanopd.widgets.strings import LANGUAGES

INTERRUPTED = 130


def add_parsers(commands: Any) -> None:
    """`sweep` and `report`, beside the other benchmarks."""
    text = "Modes x workloads or traces x rates x seeds on as many GPUs each; goes on where it was stopped, whatever stopped it."
    sweep = commands.add_parser("sweep", help=text, description=f"{text} Ends with 1 where a cell failed, with 3 where --budget left some.")
    _sweep_options(sweep)
    sweep.set_defaults(run=_sweep)
    text = "Figures of a sweep and of all that was recorded, as interactive HTML and as SVG."
    report = commands.add_parser("report", help=text, description=text)
    report.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="a sweep's folder, or one of runs of `bench serve --out`")
    report.add_argument("--recorded", action="store_true", help="what comes with the package")
    report.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="default: %(default)s")
    report.add_argument("--lang", choices=LANGUAGES, help="default: that of the environment")
    report.set_defaults(run=_report)


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=tuple(CASES), default="cuda", help="cpu: each worker stands for a GPU")
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="that each mode has; default: %(default)s")
    parser.add_argument("--model", help="random weights, except for 'tiny'; default: qwen3-8b, or tiny on the CPU")
    parser.add_argument("--modes", nargs="+", default=list(MODES), metavar="MODE[=TOPOLOGY]",
                        help="such as collocated 'disaggregated=P:0 D:1'; default: %(default)s")
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help=f"{', '.join(NAMES)}, or PROMPTS/OUTPUTS such as 64-256/128")
    parser.add_argument("--trace", nargs="+", default=[], metavar="FILE",
                        help="recorded requests, Azure's CSV or Mooncake's JSON lines, sped up to each rate: a workload more, or the only "
                             "one where no --workloads are named")
    parser.add_argument("--requests", type=positive, metavar="N", help="of a trace, the same at each rate; default: "
                        + ", ".join(f"{case.requests} ({device})" for device, case in CASES.items()))
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--rates", nargs="+", type=_above_0, metavar="R", help="requests a second")
    load.add_argument("--shares", nargs="+", type=_above_0, metavar="X", help="of what the planner says the best way can serve in time")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="S")
    parser.add_argument("--window", type=_above_0, metavar="SECONDS", help="in which requests come that count; of a trace it is as long as "
                        "its requests take")
    parser.add_argument("--warmup", type=_seconds, metavar="SECONDS", help="before it")
    parser.add_argument("--tail", type=_seconds, metavar="SECONDS", help="after it, in which requests go on to come")
    parser.add_argument("--slo-ttft", type=_above_0, metavar="MS")
    parser.add_argument("--slo-tpot", type=_above_0, metavar="MS")
    parser.add_argument("--executor", choices=("inline", "process"), help="inline: one process, on the CPU or one GPU")
    parser.add_argument("--profile", metavar="FILE|PRESET", help="default: DIR/profile.json, the preset of this device, or measured now")
    parser.add_argument("--budget", type=_above_0, metavar="SECONDS", help="begin no cell that would not end within them")
    parser.add_argument("--plan", action="store_true", help="print the cells and how long they take, and run nothing")
    parser.add_argument("--out", type=Path, default=Path("sweep"), metavar="DIR", help="a file for each cell; default: %(default)s")
    parser.add_argument("--commit", help="the commit to record, where this copy has no .git")


def _above_0(text: str) -> float:
    value = _seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _grid(options: argparse.Namespace, case: Case) -> Grid:
    given = {"model": options.model, "warmup": options.warmup, "window": options.window, "tail": options.tail,
             "slo_ttft_ms": options.slo_ttft, "slo_tpot_ms": options.slo_tpot, "executor": options.executor}
    base = replace(case.base, **{name: value for name, value in given.items() if value is not None})
    rates, shares = tuple(options.rates or ()), tuple(options.shares or case.shares)
    workloads = options.workloads or (() if options.trace else case.workloads)
    return Grid(base, options.gpus, tuple(options.modes), tuple(workloads), tuple(options.seeds), rates, shares, options.device,
                tuple(options.trace), options.requests or case.requests)


def _sweep(options: argparse.Namespace) -> int:
    if options.gpus < 1:
        raise ValueError(f"--gpus is a number of at least 1, got {options.gpus}")
    case = CASES[options.device]
    grid, store = _grid(options, case), Store(options.out)
    grid.check()
    from nanopd.demo import one_thread

    with one_thread(grid.base.model == "tiny" and grid.device == "cpu"):
        known = known_profile(grid, options.profile, options.out, _gpu(grid, options.plan))
        if known is None and needs_profile(grid):
            if options.plan:
                raise ValueError("rates and adaptive mode follow from a profile of this machine, which a sweep without --plan "
                                 "measures first; name one with --profile")
            known = measure(grid, options.out, case.profile_seconds)
        cells, pace = plan(grid, known), Pace(grid, known, case.start_seconds)
        if options.plan:
            print("\n".join(lines(cells, store, pace)))
            return 0
        return _run(cells, store, pace, known, options)


def _run(cells: list[Any], store: Store, pace: Pace, known: Known | None, options: argparse.Namespace) -> int:
    def stamp(record: RunRecord) -> RunRecord:
        record = replace(record, command=options.command)
        return replace(record, commit=options.commit, dirty=None) if options.commit else record

    try:
        tally = run(cells, store, pace, known, options.budget, stamp)
    except KeyboardInterrupt:
        done = sum(map(store.has, cells))
        print(f"\nstopped: {done} of {len(cells)} cells are in {store.folder}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    if tally.failed:
        print(f"nanopd: {tally.failed} cells failed, see {store.folder}/*.failed; the same command tries them again", file=sys.stderr)
    if tally.left:
        print(f"nanopd: {tally.left} cells did not fit into --budget; the same command goes on with them", file=sys.stderr)
    return tally.exit_code


def _gpu(grid: Grid, is_plan: bool) -> str | None:
    """Its name; None on the CPU, and where a plan is made on a machine without one. Raises CannotMeasure where there are too few."""
    if grid.device == "cpu":
        return None
    import torch

    from nanopd.benchmark.environment import CannotMeasure

    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number < grid.gpus and not is_plan:
        raise CannotMeasure(f"`bench sweep` with --gpus {grid.gpus} needs as many CUDA devices, and torch sees {number}; "
                            "`nanopd bench sweep --device cpu` shows it on the CPU")
    return torch.cuda.get_device_name() if number else None


def _report(options: argparse.Namespace) -> int:
    if (options.folder is None) != options.recorded:
        raise ValueError("name a folder of runs, or --recorded for what comes with the package")
    try:
        from nanopd.benchmark.report.page import write_report
    except ImportError as error:
        raise ValueError(f"figures need plotly ({error}): pip install 'nanopd[lab]'") from None
    from nanopd.widgets.strings import set_language

    if options.lang:
        set_language(options.lang)
    print(write_report(options.out, RECORDED, options.folder))
    return 0
