"""The cluster timeline: what each worker computed and what it sent, on one clock, a colour for each request.

A worker has a lane for its steps and, where it has sent any prompt's KV, one for those transfers. Of a transfer, what was
under way while the prompt was still being computed cost nobody any time; what came after it is drawn apart: it is exposed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from nanopd.core import StepRecord, TransferRecord
from nanopd.messages import History
from nanopd.widgets.player import FAINT, FONT, INK, PAPER, Player
from nanopd.widgets.strings import t

REQUEST_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442", "#8a6d3b", "#6a51a3")
EXPOSED_COLOUR = "#d55e00"
KINDS = ("prefill", "decode", "transfer", "exposed")  # the figure's traces, in this order
LANE_PX = 44
MAX_SHOWN = 400  # steps and transfers at once: a bar for each row of each of them


@dataclass(frozen=True)
class Lane:
    """What a worker computes, or what leaves it."""

    worker: str
    transfers: bool


@dataclass(frozen=True)
class Bar:
    """A rectangle of one request. Times in milliseconds since the first record; `top` and `height` are shares of its lane."""

    lane: Lane
    request_id: str
    kind: str  # one of KINDS
    start: float
    width: float
    top: float
    height: float
    hover: str


@dataclass(frozen=True)
class Happening:
    """A step or a transfer: what one press of Step reveals. `start` in seconds, monotonic clock."""

    lane: Lane
    start: float
    record: StepRecord | TransferRecord
    track: int = 0  # transfers that overlap lie on tracks of their own


class ClusterTimeline(Player):
    """Steps and transfers of several workers as they lay in time; revealed in the order in which they began.

    Args:
        histories: by worker id, as `Cluster.history()` gives them. All on one machine: its monotonic clock is everybody's.

    Drag over the figure to look closer, double-click to see all of it again.
    """

    def __init__(self, histories: Mapping[str, History]) -> None:
        found: list[Happening] = []
        for worker, history in histories.items():
            found += [Happening(Lane(worker, False), step.start, step) for step in history.steps]
            found += _on_tracks(Lane(worker, True), history.transfers)
        self.happenings = sorted(found, key=lambda happening: happening.start)[-MAX_SHOWN:]
        self.lanes = [lane for worker in histories for lane in (Lane(worker, False), Lane(worker, True))
                      if not lane.transfers or any(happening.lane == lane for happening in self.happenings)]
        self._tracks = {lane: 1 + max((h.track for h in self.happenings if h.lane == lane), default=0) for lane in self.lanes}
        self._begin = min((happening.start for happening in self.happenings), default=0.0)
        requests = dict.fromkeys(_request(job) for happening in self.happenings for job in _jobs(happening.record))
        self.colours = {name: REQUEST_COLOURS[i % len(REQUEST_COLOURS)] for i, name in enumerate(requests)}
        super().__init__(self._bare_figure(), "nanopd-cluster-timeline")
        self._set_length(len(self.happenings), len(self.happenings))

    @property
    def sentence(self) -> str:
        if not self.position:
            return t("cluster.start" if self.slider.max else "cluster.empty")
        happening = self.happenings[self.position - 1]
        worker, record = f"<b>{escape(happening.lane.worker)}</b>", happening.record
        at = self._milliseconds(happening.start)
        if isinstance(record, StepRecord):
            chunks = [row.num_new for row in record.rows if row.kind == "prefill"]
            return t("cluster.step_was", worker=worker, at=f"{at:,.1f}", ms=f"{1e3 * record.duration:,.1f}", chunks=len(chunks),
                     chunk_tokens=sum(chunks), decodes=len(record.rows) - len(chunks))
        return t("cluster.transfer_was", worker=worker, at=f"{at:,.1f}", ms=f"{1e3 * (record.end - record.start):,.1f}",
                 request=escape(record.request_id), destination=escape(record.destination), transport=escape(record.transport),
                 tokens=record.num_tokens, kb=f"{record.num_bytes / 1e3:,.0f}", exposed=f"{1e3 * exposed(record):,.2f}")

    def bars(self) -> list[Bar]:
        """Of the steps and transfers revealed."""
        return [bar for happening in self.happenings[: self.position] for bar in self._bars_of(happening)]

    def _bars_of(self, happening: Happening) -> list[Bar]:
        record = happening.record
        return self._step_bars(happening, record) if isinstance(record, StepRecord) else self._transfer_bars(happening, record)

    def _step_bars(self, happening: Happening, record: StepRecord) -> list[Bar]:
        """The step's rows, one below the other."""
        share = 1 / max(1, len(record.rows))
        return [Bar(happening.lane, row.request_id, row.kind, self._milliseconds(record.start), 1e3 * record.duration, i * share,
                    share, t("cluster.row_was", request=escape(row.request_id), kind=t(f"timeline.{row.kind}"), new=row.num_new,
                             cached=row.num_cached, step=record.step, ms=f"{1e3 * record.duration:,.1f}"))
                for i, row in enumerate(record.rows)]

    def _transfer_bars(self, happening: Happening, record: TransferRecord) -> list[Bar]:
        """The part behind the computation and the exposed one."""
        share = 1 / self._tracks[happening.lane]
        hidden_until = min(max(record.computed, record.start), record.end)
        hover = t("cluster.transfer_tip", request=escape(record.request_id), destination=escape(record.destination),
                  tokens=record.num_tokens, transport=escape(record.transport), exposed=f"{1e3 * exposed(record):,.2f}")
        parts = (("transfer", record.start, hidden_until), ("exposed", hidden_until, record.end))
        return [Bar(happening.lane, record.request_id, kind, self._milliseconds(start), 1e3 * (end - start),
                    happening.track * share, share, hover) for kind, start, end in parts if end > start]

    def _milliseconds(self, moment: float) -> float:
        return 1e3 * (moment - self._begin)

    # Drawing

    def _draw(self) -> None:
        bars = self.bars()
        places = {lane: i for i, lane in enumerate(self.lanes)}
        for trace, kind in zip(self.figure.data, KINDS, strict=True):
            shown = [bar for bar in bars if bar.kind == kind]
            trace.update(
                base=[bar.start for bar in shown], x=[bar.width for bar in shown],
                y=[places[bar.lane] - 0.4 + 0.8 * (bar.top + bar.height / 2) for bar in shown],
                width=[0.8 * bar.height for bar in shown],
                marker_color=[EXPOSED_COLOUR if kind == "exposed" else self.colours[_request(bar.request_id)] for bar in shown],
                hovertext=[bar.hover for bar in shown])

    def _bare_figure(self) -> go.Figure:
        figure = go.Figure()
        styles = {"prefill": {}, "decode": {"opacity": 0.45},
                  "transfer": {"pattern": {"shape": "/", "fgcolor": PAPER, "size": 6, "solidity": 0.25}}, "exposed": {}}
        for kind in KINDS:
            colour = EXPOSED_COLOUR if kind == "exposed" else REQUEST_COLOURS[0]
            figure.add_trace(go.Bar(
                orientation="h", name=t(f"cluster.{kind}"), hovertemplate="%{hovertext}<extra></extra>",
                marker={"color": colour, "line": {"color": PAPER, "width": 0.5}, **styles[kind]}))
        bars = [bar for happening in self.happenings for bar in self._bars_of(happening)]
        end = max((bar.start + bar.width for bar in bars), default=1.0)
        names = [f"<b>{escape(lane.worker)}</b> {t('cluster.lane_transfers' if lane.transfers else 'cluster.lane_compute')}"
                 for lane in self.lanes]
        figure.update_layout(
            barmode="overlay", bargap=0, height=LANE_PX * max(1, len(self.lanes)) + 110,
            font={"family": FONT, "color": INK, "size": 12},
            plot_bgcolor=PAPER, paper_bgcolor=PAPER, margin={"l": 10, "r": 10, "t": 34, "b": 46},
            legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
            xaxis={"title": {"text": t("cluster.time_axis"), "font_color": FAINT}, "range": [0, 1.01 * end],
                   "gridcolor": "#e5e7eb", "zeroline": False, "tickfont_color": FAINT},
            yaxis={"tickvals": list(range(len(self.lanes))), "ticktext": names, "range": [len(self.lanes) - 0.5, -0.5],
                   "fixedrange": True, "automargin": True, "showgrid": False, "zeroline": False})
        return figure


def exposed(record: TransferRecord) -> float:
    """Seconds for which the request waited for nothing but its transfer."""
    return max(0.0, record.end - max(record.computed, record.start))


def _request(job: str) -> str:
    """What is tried again, as "7/1", is still the same request."""
    return job.partition("/")[0]


def _jobs(record: StepRecord | TransferRecord) -> list[str]:
    return [row.request_id for row in record.rows] if isinstance(record, StepRecord) else [record.request_id]


def _on_tracks(lane: Lane, transfers: Iterable[TransferRecord]) -> list[Happening]:
    """Each on the first track that is free when it begins."""
    ends: list[float] = []
    placed = []
    for record in sorted(transfers, key=lambda record: record.start):
        track = next((i for i, end in enumerate(ends) if end <= record.start), len(ends))
        ends[track:track + 1] = [record.end]
        placed.append(Happening(lane, record.start, record, track))
    return placed
