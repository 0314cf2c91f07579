"""The roofline: how fast a piece of work ran, against how fast the device lets anything of its kind run.

Work that does few operations for each byte it moves is limited by the bandwidth (the slope), work that does
many by the arithmetic (the flat roof). The panel measures nothing: the numbers are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import plotly.graph_objects as go

from nanopd.widgets.figure import Panel
from nanopd.widgets.player import FAINT, FONT, INK, PAPER
from nanopd.widgets.strings import t

COLOURS = ["#d55e00", "#009e73", "#cc79a7", "#e69f00", "#0072b2", "#56b4e9", "#000000"]
SYMBOLS = ["circle", "diamond", "square", "triangle-up", "star", "cross", "x"]
ROOF, MARKS = range(2)


class Point(NamedTuple):
    """A piece of work that was measured: operations done, bytes moved, seconds taken."""

    name: str
    flops: float
    bytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes

    @property
    def achieved(self) -> float:
        return self.flops / self.seconds


class Roofline(Panel):
    """Arithmetic intensity against achieved FLOP/s, under the device's roof.

    Args:
        peak_flops, bandwidth: of the device, in FLOP/s and bytes/s.
        points: (name, flops, bytes, seconds) of each piece of work.

    Raises:
        ValueError: a number is not above 0.
    """

    def __init__(self, peak_flops: float, bandwidth: float,
                 points: Iterable[tuple[str, float, float, float]] = ()) -> None:
        _require_positive(peak_flops=peak_flops, bandwidth=bandwidth)
        self.peak_flops = peak_flops
        self.bandwidth = bandwidth
        self.points: list[Point] = []
        super().__init__(self._bare_figure())
        self.add_class("nanopd-roofline")
        self._add([Point(*point) for point in points])

    @property
    def ridge(self) -> float:
        """The intensity, in FLOP per byte, from which on the arithmetic is the limit."""
        return self.peak_flops / self.bandwidth

    def roof(self, intensity: float) -> float:
        """The FLOP/s that work of this intensity can reach at most."""
        return min(self.peak_flops, intensity * self.bandwidth)

    def add_point(self, name: str, flops: float, bytes: float, seconds: float) -> None:
        """Show one more piece of work."""
        self._add([Point(name, flops, bytes, seconds)])

    def snapshot(self) -> go.Figure:
        return go.Figure(self.figure.to_plotly_json())

    def _add(self, points: list[Point]) -> None:
        for point in points:
            _require_positive(flops=point.flops, bytes=point.bytes, seconds=point.seconds)
        self.points += points
        with self.figure.batch_update():
            self._draw()

    def _draw(self) -> None:
        x_low, x_high, y_low, y_high = self._limits()
        self.figure.data[ROOF].update(x=[x_low, self.ridge, x_high],
                                      y=[self.roof(x_low), self.peak_flops, self.peak_flops])
        number = range(len(self.points))
        self.figure.data[MARKS].update(
            x=[point.intensity for point in self.points], y=[point.achieved for point in self.points],
            text=[f"<b>{point.name}</b>" for point in self.points],
            hovertext=[self._hover(point) for point in self.points],
            textposition=[self._side(point, x_low, x_high) for point in self.points],
            marker={"color": [COLOURS[i % len(COLOURS)] for i in number],
                    "symbol": [SYMBOLS[i % len(SYMBOLS)] for i in number]})
        layout = self.figure.layout
        layout.xaxis.range = [math.log10(x_low), math.log10(x_high)]
        decades = [10.0 ** k for k in range(math.ceil(math.log10(y_low)), math.floor(math.log10(y_high)) + 1)]
        layout.yaxis.update(range=[math.log10(y_low), math.log10(y_high)],
                            tickvals=decades, ticktext=[_si(decade) for decade in decades])
        layout.shapes = [
            _area(x_low, self.ridge, "rgba(86,180,233,0.10)"),
            _area(self.ridge, x_high, "rgba(230,159,0,0.10)"),
            {"type": "line", "x0": self.ridge, "x1": self.ridge, "y0": y_low, "y1": self.peak_flops,
                 "line": {"color": FAINT, "width": 1, "dash": "dot"}}]
        layout.annotations = self._labels(x_low, x_high, y_low)

    def _limits(self) -> tuple[float, float, float, float]:
        """Room for the ridge, the points and a bit around them."""
        intensities = [self.ridge / 30, self.ridge * 10, *(point.intensity for point in self.points)]
        rates = [self.peak_flops, *(point.achieved for point in self.points)]
        x_low, x_high = min(intensities) / 2, max(intensities) * 2
        return x_low, x_high, min(*rates, self.roof(x_low)) / 2, max(rates) * 4

    def _labels(self, x_low: float, x_high: float, y_low: float) -> list[dict[str, object]]:
        def zone(low: float, high: float, name: str, limit: str, colour: str) -> dict[str, object]:
            return {"x": math.log10(math.sqrt(low * high)), "y": 1, "yref": "paper", "yanchor": "top",
                    "text": f"<b>{t(name)}</b><br>{limit}", "showarrow": False, "font_color": colour}

        return [
            zone(x_low, self.ridge, "roofline.memory_bound", f"{_si(self.bandwidth)}B/s", "#0072b2"),
            zone(self.ridge, x_high, "roofline.compute_bound", f"{_si(self.peak_flops)}FLOP/s", "#a86400"),
            {"x": math.log10(self.ridge), "y": math.log10(y_low), "xanchor": "left", "yanchor": "bottom",
             "xshift": 5, "text": t("roofline.ridge", x=_plain(self.ridge)), "showarrow": False,
             "font_color": FAINT}]

    def _side(self, point: Point, x_low: float, x_high: float) -> str:
        """Names go where the figure has room for them."""
        place = math.log(point.intensity / x_low) / math.log(x_high / x_low)
        return "middle left" if place > 0.7 else "middle right"

    def _hover(self, point: Point) -> str:
        roof = self.roof(point.intensity)
        limit = "roofline.memory_bound" if point.intensity < self.ridge else "roofline.compute_bound"
        return "<br>".join([
            f"<b>{point.name}</b>", t(limit),
            f"{_si(point.flops)}FLOP, {_si(point.bytes)}B, {_si(point.seconds)}s",
            t("roofline.intensity_is", x=_plain(point.intensity)),
            t("roofline.achieved_is", rate=f"{_si(point.achieved)}FLOP/s",
              percent=f"{100 * point.achieved / roof:.0f}")])

    def _bare_figure(self) -> go.Figure:
        figure = go.Figure([
            go.Scatter(mode="lines", line={"color": INK, "width": 3}, hoverinfo="skip"),
            go.Scatter(mode="markers+text", marker={"size": 13, "line": {"color": PAPER, "width": 1.5}},
                       cliponaxis=False, hovertemplate="%{hovertext}<extra></extra>")])
        axis = {"type": "log", "gridcolor": "#e5e7eb", "zeroline": False, "dtick": 1, "fixedrange": True,
                    "tickfont_color": FAINT}
        figure.update_layout(
            autosize=True, paper_bgcolor=PAPER, plot_bgcolor=PAPER,
            font={"family": FONT, "size": 12, "color": INK},
            height=420, margin={"l": 80, "r": 20, "t": 16, "b": 54}, dragmode=False, showlegend=False,
            hoverlabel={"font_family": FONT, "align": "left"},
            xaxis=dict(axis, title_text=t("roofline.x")), yaxis=dict(axis, title_text=t("roofline.y")))
        return figure


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0 or math.isinf(value):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")


def _area(x0: float, x1: float, colour: str) -> dict[str, object]:
    return {"type": "rect", "x0": x0, "x1": x1, "y0": 0, "y1": 1, "yref": "paper", "fillcolor": colour,
            "line_width": 0, "layer": "below"}


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _si(value: float) -> str:
    """ "3.35 T": three digits and the prefix of the unit that follows."""
    exponent = min(max(math.floor(math.log10(value) / 3), -4), 5)
    return f"{value / 1000 ** exponent:.3g} {'pnµm kMGTP'[exponent + 4].strip()}"
