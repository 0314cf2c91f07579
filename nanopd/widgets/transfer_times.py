"""Bandwidth of KV transfers over the number of blocks, for each transport: recorded on GPUs, or measured here on the CPU.

Every figure says which of the two it is; where nothing was recorded, the panel says that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import ipywidgets as widgets
import plotly.graph_objects as go

from nanopd.benchmark.results import Report, load
from nanopd.widgets.figure import Panel
from nanopd.widgets.player import FAINT, FONT, INK, PAPER
from nanopd.widgets.strings import t

if TYPE_CHECKING:
    from nanopd.workers.transfer import Transport

COLOURS = {"local": "#0072b2", "peer": "#009e73", "relay": "#d55e00", "collective": "#cc79a7"}
COUNTS = [4**k for k in range(5)]  # 1 to 256 blocks, to be timed here
TIMES = 5


@dataclass(frozen=True)
class Point:
    """So many blocks, all layers, by this transport: 1e9 bytes a second."""

    transport: str
    num_blocks: int
    gb_s: float
    by_layer: bool = False  # sent a layer at a time, rather than whole


class TransferTimes(Panel):
    """Bandwidth against block count. Diamonds were recorded elsewhere; stars are measured on this machine, at a press of Measure.

    Args:
        measure: gives the points of this machine. Default: `measure_here`.
    """

    def __init__(self, measure: Callable[[], Iterable[Point]] | None = None) -> None:
        self.report = _recorded()
        self.recorded = _points(self.report)
        self.measured: list[Point] = []
        self._measure = measure or measure_here
        self.message = widgets.HTML()
        self.measure_button = widgets.Button(description=t("explorer.measure"), icon="clock-o", button_style="primary")
        self.measure_button.add_class("nanopd-measure")
        self.measure_button.on_click(lambda _: self.measure())
        super().__init__(self._figure(), above=[widgets.HBox([self.measure_button]), self.message])
        self.add_class("nanopd-transfer-times")
        self.message.value = self.sentence

    @property
    def sentence(self) -> str:
        """The badge: where the figures come from."""
        lines = [t("times.recorded", source=self.report.source) if self.report else t("times.no_run", bench="transfer")]
        if self.measured:
            lines.append(t("transfers.measured", transports=", ".join(dict.fromkeys(p.transport for p in self.measured))))
        return "<br>".join(lines)

    def measure(self) -> None:
        """Time the transports that run on this machine's CPU, and add them to the figure."""
        self.measure_button.disabled = True
        try:
            self.measured = list(self._measure())
        finally:
            self.measure_button.disabled = False
        with self.figure.batch_update():
            self.figure.data = []
            self.figure.add_traces(self._traces())
        self.message.value = self.sentence

    def snapshot(self) -> go.Figure:
        """What is shown now as a static figure, with the badge as its title."""
        figure = go.Figure(self.figure.to_plotly_json())
        return figure.update_layout(margin_t=80, title={"text": self.sentence, "font_size": 13, "x": 0.01, "xanchor": "left",
                                                        "yref": "container", "y": 0.96, "yanchor": "top"})

    def _traces(self) -> list[go.Scatter]:
        traces = []
        for points, symbol, word in ((self.recorded, "diamond", "explorer.legend_recorded"),
                                     (self.measured, "star", "explorer.legend_measured")):
            for transport, by_layer in dict.fromkeys((point.transport, point.by_layer) for point in points):
                line = [point for point in points if (point.transport, point.by_layer) == (transport, by_layer)]
                line.sort(key=lambda point: point.num_blocks)
                name = t("transfers.by_layer", transport=transport) if by_layer else transport
                traces.append(go.Scatter(
                    x=[p.num_blocks for p in line], y=[p.gb_s for p in line], mode="lines+markers",
                    name=f"{name} ({t(word)})", marker={"symbol": symbol, "size": 10},
                    line={"color": COLOURS.get(transport, INK), "width": 2, "dash": "dash" if by_layer else "solid"},
                    hovertemplate="%{x:,} · %{y:,.3g} GB/s<extra>%{fullData.name}</extra>"))
        return traces + self._ceilings()

    def _ceilings(self) -> list[go.Scatter]:
        """What plain copies reached in the recorded run."""
        if self.report is None:
            return []
        counts = [point.num_blocks for point in self.recorded] or COUNTS
        return [go.Scatter(x=[min(counts), max(counts)], y=[gb_s, gb_s], mode="lines",
                           name=name.removesuffix("_gb_s").replace("_", " "),
                           line={"color": FAINT, "width": 1.5, "dash": "dot"},
                           hovertemplate="%{y:,.3g} GB/s<extra>%{fullData.name}</extra>")
                for name, gb_s in self.report.ceilings.items() if name.endswith("_gb_s")]

    def _figure(self) -> go.Figure:
        figure = go.Figure(self._traces())
        grid = {"type": "log", "gridcolor": "#e5e7eb", "tickfont_color": FAINT}
        return figure.update_layout(
            height=360, font={"family": FONT, "color": INK, "size": 12}, plot_bgcolor=PAPER, paper_bgcolor=PAPER, showlegend=True,
            margin={"l": 10, "r": 10, "t": 30, "b": 46}, legend={"orientation": "h", "y": 1, "yanchor": "bottom"},
            xaxis={**grid, "title": {"text": t("transfers.blocks_axis"), "font_color": FAINT}, "dtick": 1},
            yaxis={**grid, "title": {"text": t("transfers.rate_axis"), "font_color": FAINT}})


def measure_here(*transports: str) -> list[Point]:
    """Transports (default: each) between two caches of the embedded model's shape on this machine's CPU; blocks in no order.

    Both ends are in this process, so where the receiver has work to do, it takes turns with the sender.
    """
    from nanopd.workers.links import TRANSPORTS

    every = [transport for transport in ("local", *TRANSPORTS) if transport != "auto"]
    return [point for transport in transports or every for point in _measure(transport)]


def _measure(transport: str) -> Iterator[Point]:
    import torch

    from nanopd.block_manager.cache import KVCache
    from nanopd.models.spec import load_spec
    from nanopd.workers.links import Links

    ends = [Links(host, transport if transport != "local" else "auto") for host in range(2)]
    source_end, destination_end = ends if transport != "local" else (ends[0], ends[0])
    try:
        source, destination = (KVCache(load_spec("tiny"), COUNTS[-1], 16, "cpu", torch.float32) for _ in range(2))
        addresses = {"source": source_end.publish("source", source),
                     "destination": destination_end.publish("destination", destination)}
        for end in ends:
            end.learn(addresses)
        for cache in (source, destination):
            cache.data.zero_()  # memory that was never touched costs its first reader extra
        link = source_end.connect("source", "destination")
        for count in COUNTS:
            blocks = [torch.randperm(COUNTS[-1])[:count].tolist() for _ in range(2)]
            seconds = median(_seconds_to_send(link, source.num_layers, *blocks) for _ in range(TIMES))
            yield Point(link.name, count, count * source.bytes_per_block / seconds / 1e9)
    finally:
        for end in ends:
            end.close()


def _seconds_to_send(link: Transport, num_layers: int, source_blocks: list[int], destination_blocks: list[int]) -> float:
    start = time.perf_counter()
    link.send(range(num_layers), source_blocks, destination_blocks).wait()
    return time.perf_counter() - start


def _recorded() -> Report | None:
    """The latest run on GPUs."""
    try:
        report = load("transfer")
    except FileNotFoundError:
        return None
    return report if report.device["kind"] == "cuda" else None


def _points(report: Report | None) -> list[Point]:
    """The rows of `nanopd bench transfer`."""
    rows = report.rows if report else []
    return [Point(row["transport"], row["blocks"], row["gb_s"], row["pieces"] == "layers") for row in rows]
