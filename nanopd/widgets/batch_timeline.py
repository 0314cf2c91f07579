"""The batch timeline: which request ran in each step of one or several engines, and what the step held.

A bar is one row of a step. Its height grows with the number of tokens, so that a prefill chunk is tall and a
decode thin; beneath are the tokens of each step against the budget, and the blocks that were free after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nanopd.core import RowRecord, StepRecord
from nanopd.widgets.player import FAINT, FONT, INK, PAPER, Player
from nanopd.widgets.strings import t

History = Iterable[StepRecord]
COLOURS = {"prefill": "#e69f00", "decode": "#0072b2"}
PREEMPTED = "#d55e00"
WORKER_LINES = [("#0072b2", "solid"), ("#d55e00", "dash"), ("#009e73", "dot"), ("#cc79a7", "dashdot")]
LANE_PX, BELOW_PX = 24, 190  # a request's lane; the two traces beneath with their gaps
MAX_STEPS = 200  # shown at once: a bar for each row of each of them
PREFILL, DECODE, MARKS, BUDGET = range(4)  # the figure's first traces; then two lines for each worker


@dataclass(frozen=True)
class Lane:
    """Where a request's answer has its bars."""

    worker: str
    request_id: str
    index: int


@dataclass(frozen=True)
class Bar:
    """One row of a step, placed."""

    lane: Lane
    start: float
    width: float
    row: RowRecord
    record: StepRecord


class BatchTimeline(Player):
    """Steps that engines have run, from their `history`; revealed step by step, all of them to begin with.

    Args:
        history: an engine's, or a worker's name to its engine's for several.
        token_budget: tokens that a step may have (`max_num_batched_tokens`), drawn as a line.

    Against time, a worker's steps are put end to end: the time it was idle in between is not in its history,
    so the clocks of two workers are not the same clock. A step of the slider is one of each worker.
    """

    def __init__(self, history: History | Mapping[str, History], token_budget: int | None = None) -> None:
        self.histories = dict(history) if isinstance(history, Mapping) else {"": history}
        self.token_budget = token_budget
        self.axis = widgets.ToggleButtons(
            options=[(t("timeline.by_step"), "step"), (t("timeline.by_time"), "time")],
            style={"button_width": "auto"})
        self.axis.add_class("nanopd-axis")
        self.axis.observe(self._reporting(self._redraw), names="value")
        super().__init__(self._bare_figure(), "nanopd-batch-timeline", extra=[self.axis])
        self._load(at_end=True)

    # Playing

    def refresh(self) -> None:
        """The engines have run on: take in the new steps, and show them if the end was shown before."""
        self._load(at_end=self.position == self.slider.max)

    def show_by(self, axis: str) -> None:
        """Put "step" or "time" on the x axis."""
        self.axis.value = axis

    def _load(self, *, at_end: bool) -> None:
        self.records = {worker: list(history) for worker, history in self.histories.items()}
        self.starts = {worker: _running_sum(record.duration for record in records)
                       for worker, records in self.records.items()}
        num_steps = max(map(len, self.records.values()), default=0)
        self._set_length(num_steps, num_steps if at_end else self.position)

    @property
    def sentence(self) -> str:
        if not self.position:
            return t("timeline.start" if self.slider.max else "timeline.empty")
        return "<br>".join(self._describe(worker, records[self.position - 1])
                           for worker, records in self.records.items() if self.position <= len(records))

    def _describe(self, worker: str, record: StepRecord) -> str:
        chunks = [row.num_new for row in record.rows if row.kind == "prefill"]
        decodes = [row for row in record.rows if row.kind == "decode"]
        name = f"<b>{escape(worker)}</b> · " if worker else ""
        sentence = t("timeline.step_was", step=record.step, chunks=len(chunks), chunk_tokens=sum(chunks),
                     decodes=len(decodes), waiting=record.num_waiting, free=record.num_free_blocks,
                     ms=_milliseconds(record.duration))
        if record.num_copies:
            sentence += t("timeline.copied", n=record.num_copies)
        if record.preempted:
            sentence += t("timeline.was_preempted", names=escape(", ".join(record.preempted)))
        return name + sentence

    # What is shown

    @property
    def by_time(self) -> bool:
        return self.axis.value == "time"

    def bars(self) -> list[Bar]:
        """The rows of the steps revealed, at most those of the last MAX_STEPS."""
        placed = []
        for worker, records in self.records.items():
            for number in self._shown_steps(records):
                start, width = self._place(worker, number)
                placed += [Bar(Lane(worker, row.request_id, row.index), start, width, row, records[number])
                           for row in records[number].rows]
        return placed

    def _shown_steps(self, records: list[StepRecord]) -> range:
        """Indices of the steps revealed and in the window."""
        return range(self._first_shown, min(self.position, len(records)))

    @property
    def _first_shown(self) -> int:
        return max(0, self.position - MAX_STEPS)

    def _place(self, worker: str, number: int) -> tuple[float, float]:
        """Where a step begins on the x axis, and how wide it is."""
        record = self.records[worker][number]
        if self.by_time:
            return 1000 * self.starts[worker][number], 1000 * record.duration
        return record.step - 0.5, 1.0

    def _lanes(self) -> list[Lane]:
        """One for each answer in the window, also in its steps to come: by worker, in order of appearance."""
        last = self._first_shown + MAX_STEPS
        return list(dict.fromkeys(
            Lane(worker, row.request_id, row.index)
            for worker, records in self.records.items()
            for record in records[self._first_shown : last] for row in record.rows))

    def _heights(self, lanes: list[Lane]) -> dict[Lane, float]:
        """Each lane's y: one below the other, with a gap between workers."""
        heights, y = {}, 0.0
        for before, lane in zip([None, *lanes], lanes):
            y += 0 if before is None else 1 if before.worker == lane.worker else 1.8
            heights[lane] = y
        return heights

    # Drawing

    def _draw(self) -> None:
        lanes, bars = self._lanes(), self.bars()
        heights = self._heights(lanes)
        rows = (row for record in self._all_records() for row in record.rows)
        most = max((row.num_new for row in rows), default=1)
        for trace, kind in ((PREFILL, "prefill"), (DECODE, "decode")):
            self._draw_bars(trace, [bar for bar in bars if bar.row.kind == kind], heights, most)
        self._draw_preemptions(heights)
        for number, worker in enumerate(self.records):
            self._draw_worker(BUDGET + 1 + 2 * number, worker)
        self._draw_frame(lanes, heights)

    def _draw_bars(self, trace: int, bars: list[Bar], heights: dict[Lane, float], most: int) -> None:
        self.figure.data[trace].update(
            y=[heights[bar.lane] for bar in bars],
            base=[bar.start for bar in bars], x=[bar.width for bar in bars],
            width=[_thickness(bar.row.num_new, most) for bar in bars],
            text=[str(bar.row.num_new) if bar.row.num_new > 1 else "" for bar in bars],
            hovertext=[self._hover(bar) for bar in bars])

    def _draw_preemptions(self, heights: dict[Lane, float]) -> None:
        """A cross where a step sent a request back to wait, on the lanes of its answers."""
        marks = [(self._place(worker, number)[0], lane) for worker, records in self.records.items()
                 for number in self._shown_steps(records) for lane in heights
                 if lane.worker == worker and lane.request_id in records[number].preempted]
        offset = 0 if self.by_time else 0.5
        self.figure.data[MARKS].update(
            x=[x + offset for x, _ in marks], y=[heights[lane] for _, lane in marks],
            hovertext=[t("timeline.preempted_at", request=escape(lane.request_id)) for _, lane in marks])

    def _draw_worker(self, trace: int, worker: str) -> None:
        """Its tokens in each step and its free blocks after it, as steps of a line."""
        records = self.records[worker]
        places = [self._place(worker, number) for number in self._shown_steps(records)]
        shown = [records[number] for number in self._shown_steps(records)]
        xs = [x for start, width in places for x in (start, start + width)]
        hovers = [self._describe(worker, record) for record in shown for _ in range(2)]
        for line, values in ((trace, [_num_tokens(record) for record in shown]),
                             (trace + 1, [record.num_free_blocks for record in shown])):
            ys = [value for value in values for _ in range(2)]
            self.figure.data[line].update(x=xs, y=ys, hovertext=hovers)

    def _draw_frame(self, lanes: list[Lane], heights: dict[Lane, float]) -> None:
        layout = self.figure.layout
        low, high = self._x_range()
        self.figure.data[BUDGET].update(x=[low, high], y=[self.token_budget, self.token_budget])
        bottom = max(heights.values(), default=0) + 0.6
        lanes_px = max(LANE_PX * (bottom + 0.6), 2 * LANE_PX)
        inner = lanes_px + BELOW_PX
        layout.height = round(inner + layout.margin.t + layout.margin.b)
        layout.yaxis.update(domain=[BELOW_PX / inner, 1], range=[bottom, -0.6],
                            tickvals=list(heights.values()),
                            ticktext=[self._lane_name(lane, lanes) for lane in lanes])
        layout.yaxis2.domain, layout.yaxis3.domain = [90 / inner, 165 / inner], [0, 65 / inner]
        records = self._all_records()
        most_tokens = max([1, self.token_budget or 0, *map(_num_tokens, records)])
        most_free = max([1, *(record.num_free_blocks for record in records)])
        for axis, most in ((layout.yaxis2, most_tokens), (layout.yaxis3, most_free)):
            axis.range = [-0.05 * most, 1.15 * most]  # a line at 0 is seen in full
        title = "timeline.time_axis" if self.by_time else "timeline.step_axis"
        layout.xaxis3.title.text = t(title + ("_of_worker" if len(self.records) > 1 else ""))
        for axis in (layout.xaxis, layout.xaxis2, layout.xaxis3):
            axis.range = [low, high]
        layout.annotations = [
            {"x": 0, "xref": "paper", "xanchor": "left", "y": top / inner, "yref": "paper",
             "yanchor": "bottom", "text": t(f"timeline.{name}"), "showarrow": False,
             "font": {"size": 12, "color": FAINT}}
            for top, name in ((inner, "requests"), (165, "tokens"), (65, "free_blocks"))]

    def _x_range(self) -> tuple[float, float]:
        """All steps if they fit, else the window; the steps to come have their room already."""
        ends = [0.0 if self.by_time else -0.5]
        starts = []
        for worker, records in self.records.items():
            window = range(self._first_shown, min(self._first_shown + MAX_STEPS, len(records)))
            places = [self._place(worker, number) for number in window]
            starts += [start for start, _ in places[:1]]
            ends += [start + width for start, width in places[-1:]]
        return min(starts, default=-0.5), max(*ends, min(starts, default=-0.5) + 1e-6)

    def _all_records(self) -> list[StepRecord]:
        return [record for records in self.records.values() for record in records]

    def _lane_name(self, lane: Lane, lanes: list[Lane]) -> str:
        """The answer is named where a request has several."""
        several = any(other.request_id == lane.request_id and other.index != lane.index for other in lanes)
        name = escape(lane.request_id) + (f".{lane.index}" if several else "")
        return f"<b>{escape(lane.worker)}</b> · {name}" if lane.worker else name

    def _hover(self, bar: Bar) -> str:
        row, record = bar.row, bar.record
        return "<br>".join([
            f"<b>{escape(row.request_id)}.{row.index}</b> · {t(f'timeline.{row.kind}')}",
            t("timeline.row_was", new=row.num_new, cached=row.num_cached),
            self._describe(bar.lane.worker, record)])

    def _bare_figure(self) -> go.Figure:
        figure = make_subplots(rows=3, cols=1, shared_xaxes=True)
        for kind, colour in COLOURS.items():
            figure.add_trace(go.Bar(
                orientation="h", name=t(f"timeline.{kind}"), textposition="inside", insidetextanchor="middle",
                textangle=0, textfont={"size": 11, "color": INK if kind == "prefill" else PAPER},
                hovertemplate="%{hovertext}<extra></extra>",
                marker={"color": colour, "line": {"color": PAPER, "width": 1}}), row=1, col=1)
        figure.add_trace(go.Scatter(
            mode="markers", name=t("timeline.preempted"), hovertemplate="%{hovertext}<extra></extra>",
            marker={"symbol": "x", "size": 11, "color": PREEMPTED, "line": {"color": PAPER, "width": 1.5}}),
            row=1, col=1)
        figure.add_trace(go.Scatter(mode="lines", name=t("timeline.budget"), hoverinfo="skip",
                                    showlegend=self.token_budget is not None,
                                    line={"color": FAINT, "width": 1.5, "dash": "dot"}), row=2, col=1)
        for number, worker in enumerate(self.histories):
            colour, dash = WORKER_LINES[number % len(WORKER_LINES)]
            for row in (2, 3):
                figure.add_trace(go.Scatter(
                    mode="lines", name=escape(worker), legendgroup=worker,
                    showlegend=bool(worker) and row == 2,
                    line={"color": colour if worker else INK, "dash": dash, "width": 2},
                    hovertemplate="%{hovertext}<extra></extra>"), row=row, col=1)
        grid = {"gridcolor": "#e5e7eb", "zeroline": False, "fixedrange": True, "tickfont_color": FAINT}
        figure.update_xaxes(**grid).update_yaxes(**grid, nticks=4)
        figure.update_layout(
            barmode="overlay", autosize=True, paper_bgcolor=PAPER, plot_bgcolor=PAPER,
            font={"family": FONT, "size": 12, "color": INK},
            margin={"l": 70, "r": 14, "t": 24, "b": 76}, dragmode=False,
            uniformtext={"minsize": 8, "mode": "hide"},
            hoverlabel={"font_family": FONT, "align": "left"},
            legend={"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "x": 0,
                    "xref": "container",
                    "itemclick": False, "itemdoubleclick": False},
            yaxis={"showgrid": False, "automargin": True})
        return figure


def _running_sum(durations: Iterable[float]) -> list[float]:
    """What had passed before each of them."""
    sums, passed = [], 0.0
    for duration in durations:
        sums.append(passed)
        passed += duration
    return sums


def _num_tokens(record: StepRecord) -> int:
    return sum(row.num_new for row in record.rows)


def _thickness(num_tokens: int, most: int) -> float:
    """Of a bar, as a share of its lane: thin for one token, else on a log scale up to the largest chunk."""
    return 0.34 if num_tokens == 1 else 0.62 + 0.26 * math.log(num_tokens) / math.log(most)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"
