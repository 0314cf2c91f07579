"""The race of chapter 08: a router of the learner's own beside fixed policies, the reference, and what is known afterwards.

    card = capstone.race(MyRouter)                      # on the open practice trace
    card = capstone.race(MyRouter, capstone.hidden())   # on three that nobody has seen
    card.show()
    card.figure()

What is known afterwards is called hindsight: the best that any of them reached on this trace, a reference that was told how long
each answer gets among them. So much can be had. Whether more could, it doesn't say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

import plotly.graph_objects as go

from nanopd.cost_model.presets import preset
from nanopd.router.planner import WorkerSize
from nanopd.router.policies import AlwaysCollocated, AlwaysDisaggregated, RoundRobin, Threshold, make_router
from nanopd.router.routing import Decision, Ended, Question, Router, WorkerView
from nanopd.widgets.player import FONT, INK, PAPER
from nanopd.widgets.strings import STRINGS, t
from nanopd.workbook import routing
from nanopd.workbook.arena import (
    PATIENCE,
    PROMISE,
    WORKERS,
    Load,
    Run,
    from_file,
    hidden,
    practice,
    run,
    simulate,
)
from nanopd.workbook.predict import columns

__all__ = ["PROMISE", "WORKERS", "Load", "ScoreCard", "from_file", "hidden", "practice", "race", "reference", "simulate", "topology"]

SIZE = WorkerSize.of(routing.SCHEDULER, routing.CACHE.num_blocks, routing.CACHE.block_size)
REFERENCE, TOLD, YOURS = "reference", "told", "yours"
FIXED: dict[str, Callable[[], Router]] = {"collocated": AlwaysCollocated, "disaggregated": AlwaysDisaggregated,
                                          "threshold": Threshold, "round-robin": RoundRobin}
COLOURS = {YOURS: "#d55e00", REFERENCE: "#0072b2", "collocated": "#d1d5db", "disaggregated": "#b6bcc6", "threshold": "#9ca3af",
           "round-robin": "#6b7280"}


def reference() -> Router:
    """The engine's own where an SLO is set, fresh: the planning router."""
    return make_router("cost", preset(routing.PROFILE).cost, slo=PROMISE, size=SIZE)


class Told:
    """The reference, which is told how long each answer will be."""

    def __init__(self, load: Load) -> None:
        self.router = reference()
        self.lengths = {str(number): min(one.output_len, one.max_tokens or one.output_len)
                        for number, one in enumerate(load.arrivals)}

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        tokens = self.lengths[question.request_id]
        return self.router.choose(question._replace(min_tokens=tokens, max_tokens=tokens), workers)

    def ended(self, answer: Ended) -> None:
        self.router.ended(answer)


def topology() -> str:
    """A worker of each role, on this machine's GPUs where it has any: the first three at most."""
    import torch

    count = torch.cuda.device_count()
    return " ".join(f"{role}:{number % count if count else 'cpu'}" for number, role in enumerate("CPD"))


# ------------------------------------------------------------------------------------------------- the race


@dataclass(frozen=True)
class Heat:
    """What came of all routers on one trace: theirs, the fixed ones, the reference, and the one that was told lengths."""

    load: Load
    runs: dict[str, Run]

    @property
    def best_fixed(self) -> float:
        """Attainment of the fixed policy that did best on this trace. Beforehand nobody knows which that is."""
        return max(self.runs[name].attainment for name in FIXED)

    @property
    def hindsight(self) -> float:
        """The best attainment of all: see the module."""
        return max(run.attainment for run in self.runs.values())


def race(router: Router | Callable[[], Router], loads: Iterable[Load] = (), *, patience: float = PATIENCE) -> ScoreCard:
    """Serve traces with a router, and with those to compare it with.

    Args:
        router: a class, or what else makes one, of which each trace gets one that has learned nothing yet. An object is used as
            it is, and goes on learning from trace to trace.
        loads: traces; the practice trace where there are none.
        patience: seconds for each.

    What goes wrong with it is on the score card.
    """
    make = (lambda: router) if hasattr(router, "choose") and not isinstance(router, type) else router
    return ScoreCard([Heat(load, {YOURS: run(make, load, patience), **rivals(load)}) for load in list(loads) or [practice()]])


@lru_cache(maxsize=16)
def rivals(load: Load) -> dict[str, Run]:
    """All but theirs. Raises what they raise."""
    makers = {**FIXED, REFERENCE: reference, TOLD: lambda: Told(load)}
    runs = {name: run(make, load) for name, make in makers.items()}
    for each in runs.values():
        if each.error is not None:
            raise each.error
    return runs


# -------------------------------------------------------------------------------------------- the score card


@dataclass(frozen=True, repr=False)
class ScoreCard:
    """Of a race. Ratios are of attainments, all traces together: on the same trace, of goodputs as well."""

    heats: list[Heat]

    @property
    def error(self) -> BaseException | None:
        """The first that theirs made, on any trace."""
        return next((error for heat in self.heats if (error := heat.runs[YOURS].error) is not None), None)

    @property
    def of_reference(self) -> float:
        """Theirs, as a share of what the reference served in time."""
        return self._mean(YOURS) / self._mean(REFERENCE)

    @property
    def of_best_fixed(self) -> float:
        """The same of the fixed policy that did best, the trace where that looks worst."""
        return min(heat.runs[YOURS].attainment / heat.best_fixed for heat in self.heats)

    @property
    def regret(self) -> float:
        """Share of what was served in time in hindsight that theirs did not."""
        return 1 - self._mean(YOURS) / fmean(heat.hindsight for heat in self.heats)

    @property
    def ranking(self) -> list[str]:
        """Theirs, the fixed policies and the reference, the best first; of equal ones theirs last."""
        return sorted([*FIXED, REFERENCE, YOURS], key=lambda name: (-self._mean(name), name == YOURS))

    @property
    def rank(self) -> int:
        """1 is the best."""
        return self.ranking.index(YOURS) + 1

    def _mean(self, name: str) -> float:
        return fmean(heat.runs[name].attainment for heat in self.heats)

    def show(self) -> None:
        """Print it."""
        print(self)

    def __repr__(self) -> str:
        lines = [line for heat in self.heats for line in (_load_name(heat.load), *_table(heat), "")]
        if self.error is not None:
            return "\n".join([*lines, t("capstone.failed", error=describe(self.error))])
        return "\n".join([*lines, t("capstone.score", ratio=f"{self.of_reference:.0%}", fixed=f"{self.of_best_fixed:.0%}",
                                    regret=f"{self.regret:.1%}", rank=self.rank, count=len(self.ranking)),
                          t("capstone.hindsight"), t("capstone.simulated")])

    def figure(self) -> go.Figure:
        """Goodput of each router on each trace, and what could be had in hindsight."""
        names = [_load_name(heat.load) for heat in self.heats]
        figure = go.Figure([go.Bar(x=names, y=[heat.runs[name].goodput for heat in self.heats], name=_router_name(name),
                                   marker_color=COLOURS[name]) for name in reversed(COLOURS)])
        best = [max(run.goodput for run in heat.runs.values()) for heat in self.heats]
        figure.add_scatter(x=names, y=best, name=t("capstone.in_hindsight"), mode="markers",
                           marker={"symbol": "line-ew", "size": 60, "line": {"width": 2, "color": INK}})
        return figure.update_layout(
            barmode="group", height=380, paper_bgcolor=PAPER, plot_bgcolor=PAPER, font={"family": FONT, "color": INK},
            margin={"l": 60, "r": 20, "t": 50, "b": 40}, title={"text": t("capstone.title"), "font_size": 14},
            yaxis={"title": t("capstone.goodput_axis"), "rangemode": "tozero"})


def describe(error: BaseException) -> str:
    """In a line, with the place where it was raised."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    code = frame.tb_frame.f_code if frame is not None else None
    where = f" ({code.co_name}, line {frame.tb_lineno})" if frame is not None and code is not None else ""
    name = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"{name}{where if not isinstance(error, (RuntimeError, TimeoutError)) else ''}"


def _load_name(load: Load) -> str:
    key = f"capstone.load.{load.name}"
    return t(key) if key in STRINGS else load.name


def _router_name(name: str) -> str:
    return t(f"capstone.router.{name}")


def _table(heat: Heat) -> list[str]:
    """The best router first."""
    rows = [[t(f"capstone.column.{name}") for name in COLUMNS]]
    rows += [_row(name, run) for name, run in sorted(heat.runs.items(), key=lambda item: -item[1].goodput)]
    widths = [max(map(columns, column)) for column in zip(*rows)]
    padded = [[cell + " " * (size - columns(cell)) if number == 0 else " " * (size - columns(cell)) + cell
               for number, (cell, size) in enumerate(zip(row, widths))] for row in rows]
    return ["  " + "  ".join(row).rstrip() for row in padded]


def _row(name: str, run: Run) -> list[str]:
    if run.summary is None:
        return [_router_name(name), *["-"] * (len(COLUMNS) - 1)]
    summary = run.summary
    times = [f"{1e3 * each.p50:,.0f} / {1e3 * each.p99:,.0f}" if each else "-" for each in (summary.ttft, summary.e2e)]
    tpot = f"{1e3 * summary.tpot.p50:,.1f} / {1e3 * summary.tpot.p99:,.1f}" if summary.tpot else "-"
    return [_router_name(name), f"{run.goodput:.1f}", f"{run.attainment:.0%}", times[0], tpot, times[1],
            f"{summary.shares.get('disaggregated', 0.0):.0%}", f"{run.microseconds:.0f}"]


COLUMNS = ("router", "goodput", "attainment", "ttft", "tpot", "e2e", "disaggregated", "microseconds")
