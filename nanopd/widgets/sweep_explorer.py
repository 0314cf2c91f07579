"""The sweep explorer: goodput and latency over the offered rate, a line for each mode, and sliders for the SLO.

What is drawn are requests, so that another SLO needs no other run. Every figure says whether they were measured here,
recorded elsewhere or simulated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import ipywidgets as widgets
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nanopd.benchmark.report.runs import wilson
from nanopd.benchmark.report.style import MODE_COLOURS, MORE_COLOURS
from nanopd.config import SLO
from nanopd.metrics import Outcome, meets, quantile
from nanopd.widgets.figure import Panel
from nanopd.widgets.player import FAINT, FONT, INK, PAPER
from nanopd.widgets.strings import t

if TYPE_CHECKING:
    from nanopd.benchmark.load import Load, RunRecord

ORIGINS = ("measured", "recorded", "simulated")
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
ENOUGH = 0.9  # share of the requests that have to meet the SLO for a rate to be served


class Felt(NamedTuple):
    """A request that was answered. Seconds."""

    ttft: float
    tpot: float | None  # None for an answer of one token


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    `line` is what its points are joined by, a mode for example; `rate` what was offered, in requests a second; `requests` all
    of the window, None for one that was not answered; `seconds` from its first arrival to its last token.
    """

    line: str
    rate: float
    seconds: float
    requests: Sequence[Felt | None]

    @classmethod
    def of_load(cls, line: str, rate: float, load: Load) -> Cell:
        return cls._of(line, rate, [record if record.status == "completed" else None for record in load.counted])

    @classmethod
    def of_simulated(cls, line: str, rate: float, requests: Iterable[Outcome]) -> Cell:
        return cls._of(line, rate, list(requests))

    @classmethod
    def of_run(cls, run: RunRecord) -> Cell:
        """A cell of `nanopd bench sweep`, or a run of `nanopd bench serve`, as `load_runs` reads them; by its mode."""
        columns = zip(run.requests["status"], run.requests["ttft"], run.requests["tpot"])
        felt = [Felt(ttft, tpot) if status == "completed" else None for status, ttft, tpot in columns]
        return cls(run.settings["mode"], run.settings["rate"], run.metrics["duration"], felt)

    @classmethod
    def pooled(cls, cells: Iterable[Cell]) -> Cell:
        """Runs of one line at one rate, which differ by their seeds, as one."""
        cells = list(cells)
        return replace(cells[0], seconds=sum(cell.seconds for cell in cells), requests=[one for cell in cells for one in cell.requests])

    @classmethod
    def _of(cls, line: str, rate: float, outcomes: Sequence[Outcome | None]) -> Cell:
        answered = [one for one in outcomes if one is not None]
        seconds = (max(one.arrival + one.e2e for one in answered) - min(one.arrival for one in answered)) if answered else math.inf
        return cls(line, rate, seconds, [one and Felt(one.ttft, one.tpot) for one in outcomes])

    def attainment(self, slo: SLO) -> float:
        """Share that met the SLO, of all: who was not answered did not."""
        return self._num_met(slo) / len(self.requests) if self.requests else 0.0

    def goodput(self, slo: SLO) -> float:
        """Requests a second that met the SLO."""
        return self._num_met(slo) / self.seconds

    def interval(self, slo: SLO) -> tuple[float, float]:
        """Where the goodput lies with 95% confidence, if requests are independent."""
        low, high = wilson(self.attainment(slo), len(self.requests)) if self.requests else (0.0, 0.0)
        return low * len(self.requests) / self.seconds, high * len(self.requests) / self.seconds

    def latency(self, name: str, share: float) -> float | None:
        """A quantile of "ttft" or "tpot", in seconds, of those that were answered; None where there are none."""
        values = [value for one in self.requests if one is not None and (value := getattr(one, name)) is not None]
        return quantile(values, share) if values else None

    def _num_met(self, slo: SLO) -> int:
        return sum(one is not None and meets(one, slo) for one in self.requests)


class SweepExplorer(Panel):
    """Goodput against the offered rate, and a quantile of TTFT and of TPOT, each with its bound of the SLO; sliders move the bounds.

    Args:
        cells: the runs, in any order.
        origin: "measured" (on this machine), "recorded" or "simulated": stands above the figure.
        device: on which, or what is simulated; a report's `source` where it was recorded.
        slo: to begin with.
    """

    def __init__(self, cells: Iterable[Cell], origin: str, device: str, slo: SLO) -> None:
        if origin not in ORIGINS:
            raise ValueError(f"a sweep is one of {', '.join(ORIGINS)}, got {origin!r}")
        self.lines: dict[str, list[Cell]] = {}
        for cell in sorted(cells, key=lambda cell: cell.rate):
            self.lines.setdefault(cell.line, []).append(cell)
        if not self.lines:
            raise ValueError("there is nothing to explore: give at least one cell")
        self.badge = t(f"sweep.{origin}", device=escape(device))
        self._make_controls(slo)
        self.message = widgets.HTML()
        super().__init__(self._bare_figure(), above=[self._row(), self.message])
        self.add_class("nanopd-sweep-explorer")
        self._redraw()

    # What is shown

    @property
    def slo(self) -> SLO:
        """As the sliders stand."""
        return SLO(self.ttft.value / 1e3, self.tpot.value / 1e3)

    def goodput(self, line: str) -> dict[float, float]:
        """Requests a second that met the SLO, by the rate that was offered."""
        return {cell.rate: cell.goodput(self.slo) for cell in self.lines[line]}

    def highest_rate(self, line: str) -> float | None:
        """The highest that was offered at which at least ENOUGH of the requests met the SLO, as they did at each below it."""
        highest = None
        for cell in self.lines[line]:
            if cell.attainment(self.slo) < ENOUGH:
                break
            highest = cell.rate
        return highest

    @property
    def sentence(self) -> str:
        """Where it is from, and what each line reaches; HTML."""
        said = []
        for line in self.lines:
            highest = self.highest_rate(line)
            said.append(t("sweep.none", line=_name(line)) if highest is None
                        else t("sweep.reaches", line=_name(line), rate=f"{highest:.3g}"))
        return f"{self.badge}<br>{t('sweep.verdict', share=f'{ENOUGH:.0%}', lines=' · '.join(said))}"

    def snapshot(self) -> go.Figure:
        """What is shown now as a static figure, with the words as its title."""
        figure = go.Figure(self.figure.to_plotly_json())
        title = {"text": self.sentence, "font_size": 12, "x": 0.01, "xanchor": "left", "yref": "container", "y": 0.96, "yanchor": "top"}
        return figure.update_layout(margin_t=figure.layout.margin.t + 50, height=figure.layout.height + 50, title=title)

    # What changes it

    def show(self, **values: Any) -> None:
        """Move the controls: show(ttft=500, tpot=8, share="p90"), milliseconds."""
        for name, value in values.items():
            {"ttft": self.ttft, "tpot": self.tpot, "share": self.share}[name].value = value

    def _make_controls(self, slo: SLO) -> None:
        self.ttft = self._bound("ttft", slo.ttft)
        self.tpot = self._bound("tpot", slo.tpot)
        self.share = widgets.ToggleButtons(options=list(SHARES), value="p99", style={"button_width": "auto"})
        for control in (self.ttft, self.tpot, self.share):
            control.observe(lambda _: self._redraw(), names="value")

    def _bound(self, name: str, seconds: float) -> widgets.FloatLogSlider:
        """A slider in milliseconds, from below the quickest cell's median to beyond the slowest one's p99."""
        cells = [cell for line in self.lines.values() for cell in line]
        found = [1e3 * value for cell in cells for share in (0.5, 0.99) if (value := cell.latency(name, share)) is not None]
        low, high = min([*found, 1e3 * seconds]) / 2, max([*found, 1e3 * seconds]) * 2
        slider = widgets.FloatLogSlider(
            value=1e3 * seconds, min=math.log10(low), max=math.log10(high), step=0.01, readout_format=".3g",
            description=t(f"sweep.{name}_bound"), style={"description_width": "initial"},
            layout=widgets.Layout(width="auto", flex="1 1 260px", margin="2px 12px 2px 0"))
        slider.add_class(f"nanopd-{name}-bound")
        return slider

    def _row(self) -> widgets.HBox:
        return widgets.HBox([self.ttft, self.tpot, self.share], layout=widgets.Layout(flex_flow="row wrap", align_items="center"))

    # Drawing

    def _redraw(self) -> None:
        with self.figure.batch_update():
            self._draw()
        self.message.value = self.sentence

    def _draw(self) -> None:
        traces = iter(self.figure.data)
        for cells in self.lines.values():
            self._draw_goodput(next(traces), cells)
        for place, name in enumerate(("ttft", "tpot"), 1):
            self.figure.layout.annotations[place].text = t(f"sweep.{name}_title", share=self.share.value)
            for cells in self.lines.values():
                values = [cell.latency(name, SHARES[self.share.value]) for cell in cells]
                next(traces).update(x=[cell.rate for cell in cells], y=[value and 1e3 * value for value in values])
        for bound in (self.ttft.value, self.tpot.value):
            next(traces).update(x=self._span, y=[bound, bound])

    def _draw_goodput(self, trace: go.Scatter, cells: Sequence[Cell]) -> None:
        good, ends = [cell.goodput(self.slo) for cell in cells], [cell.interval(self.slo) for cell in cells]
        trace.update(x=[cell.rate for cell in cells], y=good, error_y={
            "array": [high - value for (_, high), value in zip(ends, good)],
            "arrayminus": [value - low for (low, _), value in zip(ends, good)]},
            hovertext=[t("sweep.hover", rate=f"{cell.rate:.3g}", good=f"{value:.3g}", share=f"{cell.attainment(self.slo):.0%}",
                         number=len(cell.requests)) for cell, value in zip(cells, good)])

    @property
    def _span(self) -> list[float]:
        """The rates, from nothing to the highest."""
        return [0.0, max(cell.rate for cells in self.lines.values() for cell in cells)]

    def _bare_figure(self) -> go.Figure:
        figure = make_subplots(rows=1, cols=3, column_widths=[0.42, 0.29, 0.29], horizontal_spacing=0.06,
                               subplot_titles=[t("sweep.goodput_title"), " ", " "])
        bars, extra = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 4}, "<extra>%{fullData.name}</extra>"
        others = iter(MORE_COLOURS * len(self.lines))
        colours = {line: MODE_COLOURS.get(line) or next(others) for line in self.lines}
        for place in (1, 2, 3):
            for line, colour in colours.items():
                figure.add_trace(go.Scatter(
                    mode="lines+markers", name=_name(line), legendgroup=line, showlegend=place == 1, line={"color": colour, "width": 2},
                    marker={"size": 8}, error_y={**bars, "visible": place == 1},
                    hovertemplate=("%{hovertext}" if place == 1 else "%{y:,.4g}") + extra), 1, place)
        dashed = {"color": INK, "width": 1.5, "dash": "dash"}
        for place in (2, 3):
            figure.add_trace(go.Scatter(mode="lines", name=t("sweep.bound"), line=dashed, legendgroup="bound", showlegend=place == 2,
                                        hovertemplate="%{y:,.4g}" + extra), 1, place)
        figure.add_trace(go.Scatter(x=self._span, y=self._span, mode="lines", name=t("sweep.offered"), hoverinfo="skip",
                                    line={"color": FAINT, "width": 1.5, "dash": "dot"}), 1, 1)
        figure.update_annotations(font={"size": 12, "color": FAINT})
        figure.update_xaxes(gridcolor="#e5e7eb", zeroline=False, tickfont_color=FAINT, rangemode="tozero",
                            title={"text": t("sweep.rate_axis"), "font_color": FAINT})
        figure.update_yaxes(gridcolor="#e5e7eb", zeroline=False, tickfont_color=FAINT, rangemode="tozero")
        figure.update_yaxes(type="log", dtick="D2", col=2)
        return figure.update_layout(
            height=380, font={"family": FONT, "color": INK, "size": 12}, plot_bgcolor=PAPER, paper_bgcolor=PAPER,
            margin={"l": 10, "r": 10, "t": 40, "b": 90},
            legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.24, "yanchor": "top"})


def _name(line: str) -> str:
    """Of a mode in the reader's language; of anything else as it is."""
    return t(f"live.{line}") if line in MODE_COLOURS else escape(line)
