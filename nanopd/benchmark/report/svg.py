"""A plotly figure as SVG, without a browser: of plotly what our figures use.

Scatter traces (lines, markers, outlines filled to themselves, error bars), bars (stacked or over one another, upright or lying),
heat maps with their texts and colour bar; linear and logarithmic axes in any number of panels, their titles, one legend on top. The
picture is a white card, which is legible on a dark page too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from nanopd.benchmark.report.scales import Scale, number, spread
from nanopd.benchmark.report.style import LEGEND_GAP, LEGEND_MARK, LEGEND_ROW, WIDTH
from nanopd.benchmark.report.text import LINE, text_svg, text_width
from nanopd.widgets.player import FAINT, FONT, INK, PAPER

DASHES = {"dot": "2 4", "dash": "7 4"}
TICK_PX, TICK_SIZE = 55, 11  # about, from tick to tick; of their texts
COLORBAR_PX = 130
LEGEND_SIZE = 12


def to_svg(figure: go.Figure) -> str:
    """The figure as it stands. Raises ValueError for a kind of trace that is not drawn here."""
    return _Picture(figure).svg()


@dataclass
class Panel:
    """A pair of axes and what lies in it."""

    x: Any  # plotly's axes
    y: Any
    traces: list[Any] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    left: float = 0.0  # pixels
    right: float = 0.0
    top: float = 0.0
    bottom: float = 0.0
    x_scale: Scale | None = None
    y_scale: Scale | None = None


@dataclass
class Shape:
    """A bar or a cell: its corners as values."""

    trace: Any
    x0: float
    x1: float
    y0: float
    y1: float
    fill: str
    text: str = ""


class _Picture:
    def __init__(self, figure: go.Figure) -> None:
        self.figure, self.layout = figure, figure.layout
        self.width, self.height = self.layout.width or WIDTH, self.layout.height or 450
        self.panels: dict[tuple[str, str], Panel] = {}
        for trace in figure.data:
            if trace.type not in ("scatter", "bar", "heatmap"):
                raise ValueError(f"a trace of type {trace.type!r} is not drawn as SVG; those of type scatter, bar and heatmap are")
            key = trace.xaxis or "x", trace.yaxis or "y"
            if key not in self.panels:
                self.panels[key] = Panel(self.layout[_axis_name(key[0])], self.layout[_axis_name(key[1])])
            self.panels[key].traces.append(trace)
        for panel in self.panels.values():
            panel.shapes = [*_bars(panel.traces, self.layout), *_cells(panel.traces)]
        self.bar_of_colours = next((trace for trace in figure.data if trace.type == "heatmap" and trace.showscale is not False), None)
        self._place_panels()

    # -------------------------------------------------------------------------------------------- where things are

    def _place_panels(self) -> None:
        margin = self.layout.margin
        ranges = {key: (self._range(panel, "x"), self._range(panel, "y")) for key, panel in self.panels.items()}
        ranges = self._matched(ranges)
        left = max([margin.l, *(self._left_room(panel, ranges[key][1]) for key, panel in self.panels.items()
                                if not panel.x.domain or panel.x.domain[0] < 0.01)])
        right = self.width - margin.r - (COLORBAR_PX if self.bar_of_colours is not None else 0)
        top, bottom = margin.t, self.height - margin.b
        self.area = left, right, top, bottom
        for key, panel in self.panels.items():
            x_domain, y_domain = panel.x.domain or (0, 1), panel.y.domain or (0, 1)
            panel.left, panel.right = (left + share * (right - left) for share in x_domain)
            panel.bottom, panel.top = (bottom - share * (bottom - top) for share in y_domain)
            (x0, x1), (y0, y1) = ranges[key]
            panel.x_scale = Scale(x0, x1, panel.left, panel.right, panel.x.type == "log")
            panel.y_scale = Scale(y0, y1, panel.bottom, panel.top, panel.y.type == "log")

    def _range(self, panel: Panel, letter: str) -> tuple[float, float]:
        axis = panel.x if letter == "x" else panel.y
        is_log = axis.type == "log"
        if axis.range:
            return tuple(10 ** end for end in axis.range) if is_log else tuple(axis.range)
        values = [value for trace in panel.traces if trace.type == "scatter" for value in _extent(trace, letter)]
        values += [value for shape in panel.shapes for value in ((shape.x0, shape.x1) if letter == "x" else (shape.y0, shape.y1))]
        is_map = any(trace.type == "heatmap" for trace in panel.traces)
        is_value = any(trace.type == "bar" and (trace.orientation == "h") == (letter == "x") for trace in panel.traces)
        return spread(values, is_log, axis.rangemode == "tozero" or is_value, is_padded=not is_map)

    def _matched(self, ranges: dict[tuple[str, str], tuple[tuple[float, float], tuple[float, float]]]) -> dict:
        """Axes that match another one have its range, which is the widest of them."""
        alike: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for key, (_, y_range) in ranges.items():
            alike[self.panels[key].y.matches or key[1]].append(y_range)
        return {key: (x_range, (min(low for low, _ in those), max(high for _, high in those)) if len(those) > 1 else those[0])
                for key, (x_range, _) in ranges.items() for those in [alike[self.panels[key].y.matches or key[1]]]}

    def _left_room(self, panel: Panel, y_range: tuple[float, float]) -> float:
        scale = Scale(*y_range, 0, self.height / 2, panel.y.type == "log")
        widest = max((text_width(text, TICK_SIZE) for _, text in _ticks(panel.y, scale)), default=0)
        return widest + (34 if panel.y.title.text else 16)

    # ------------------------------------------------------------------------------------------------ the picture

    def svg(self) -> str:
        title = re.sub(r"<[^>]*>", "", self.layout.title.text or "")
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" '
                 f'height="{self.height:g}" font-family="{escape(FONT)}" role="img" aria-label="{escape(title)}">',
                 f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>', *self._head(), *self._legend()]
        for number_, (key, panel) in enumerate(self.panels.items()):
            parts += [f'<clipPath id="panel{number_}"><rect x="{panel.left - 5:.1f}" y="{panel.top - 5:.1f}" '
                      f'width="{panel.right - panel.left + 10:.1f}" height="{panel.bottom - panel.top + 10:.1f}"/></clipPath>',
                      *self._axes(panel), _panel_tag(key, panel, number_), *self._drawn(panel), "</g>"]
        parts += [*self._annotations(), *self._colour_bar(), "</svg>"]
        return "\n".join(part for part in parts if part) + "\n"

    def _head(self) -> Iterator[str]:
        title = self.layout.title
        if title.text:
            yield text_svg(title.text, 16, 30, title.font.size or 16, INK)
        if title.subtitle.text:
            size = title.subtitle.font.size or 12
            fits = min(1.0, (self.width - 32) / text_width(title.subtitle.text, size))  # a source may have much to say
            yield text_svg(title.subtitle.text, 16, 50, round(size * fits, 1), FAINT)

    def _legend(self) -> Iterator[str]:
        shown = [trace for trace in self.figure.data if trace.showlegend is not False and trace.name and trace.type != "heatmap"]
        if self.layout.showlegend is False or len(shown) < 2:
            return
        rows: list[list[tuple[Any, float]]] = [[]]
        room = self.width - 32
        for trace in shown:
            width = LEGEND_MARK + text_width(trace.name, LEGEND_SIZE) + LEGEND_GAP
            if rows[-1] and sum(each for _, each in rows[-1]) + width > room:
                rows.append([])
            rows[-1].append((trace, width))
        for line, row in enumerate(rows):
            x, y = self.width - 16 - sum(width for _, width in row), 76 + line * LEGEND_ROW
            for trace, width in row:
                yield _legend_mark(trace, x, y - 4)
                yield text_svg(trace.name, x + LEGEND_MARK, y, LEGEND_SIZE, INK)
                x += width

    def _axes(self, panel: Panel) -> Iterator[str]:
        for position, text in _ticks(panel.x, panel.x_scale):
            if panel.x.showgrid is not False:
                yield _line(position, panel.top, position, panel.bottom, panel.x.gridcolor)
            yield text_svg(text, position, panel.bottom + 16, TICK_SIZE, FAINT, "middle")
        for position, text in _ticks(panel.y, panel.y_scale):
            if panel.y.showgrid is not False:
                yield _line(panel.left, position, panel.right, position, panel.y.gridcolor)
            if panel.y.showticklabels is not False:
                yield text_svg(text, panel.left - 6, position + 4 - LINE * TICK_SIZE / 2 * text.count("<br>"), TICK_SIZE, FAINT, "end")
        yield _line(panel.left, panel.bottom, panel.right, panel.bottom, FAINT)
        if panel.x.title.text:
            lines = 1 + max((text.count("<br>") for _, text in _ticks(panel.x, panel.x_scale)), default=0)
            yield text_svg(panel.x.title.text, (panel.left + panel.right) / 2, panel.bottom + 20 + 14 * lines, 12, FAINT, "middle")
        if panel.y.title.text:
            x, y = 18, (panel.top + panel.bottom) / 2
            yield text_svg(panel.y.title.text, x, y, 12, FAINT, "middle", f"rotate(-90 {x} {y:.1f})")

    def _drawn(self, panel: Panel) -> Iterator[str]:
        for trace in panel.traces:
            name = escape(trace.name or "")
            yield f'<g class="trace {trace.type}" data-name="{name}">'
            if trace.type == "scatter":
                yield from _scatter(trace, panel)
            else:
                yield from (_rect(shape, panel) for shape in panel.shapes if shape.trace is trace)
            yield "</g>"
        for shape in panel.shapes:
            if shape.text:
                yield self._cell_text(shape, panel)

    @staticmethod
    def _cell_text(shape: Shape, panel: Panel) -> str:
        x = (panel.x_scale.at(shape.x0) + panel.x_scale.at(shape.x1)) / 2
        y = (panel.y_scale.at(shape.y0) + panel.y_scale.at(shape.y1)) / 2
        room = abs(panel.x_scale.at(shape.x1) - panel.x_scale.at(shape.x0))
        size = min(TICK_SIZE, TICK_SIZE * room / (text_width(shape.text, TICK_SIZE) + 6))
        return text_svg(shape.text, x, y + 4 - LINE * size / 2 * shape.text.count("<br>"), size, readable_on(shape.fill), "middle")

    def _annotations(self) -> Iterator[str]:
        """Panels' titles: plotly places them in shares of the area of all panels."""
        left, right, top, bottom = self.area
        for note in self.layout.annotations:
            x, y = left + note.x * (right - left), bottom - note.y * (bottom - top)
            yield text_svg(note.text, x, y - 8, note.font.size or 13, INK, "middle")

    def _colour_bar(self) -> Iterator[str]:
        trace = self.bar_of_colours
        if trace is None:
            return
        _, right, top, bottom = self.area
        x, ends = right + 24, (trace.zmin, trace.zmax)
        yield '<defs><linearGradient id="scale" x1="0" y1="1" x2="0" y2="0">' + "".join(
            f'<stop offset="{share:g}" stop-color="{colour}"/>' for share, colour in trace.colorscale) + "</linearGradient></defs>"
        yield (f'<rect x="{x:.1f}" y="{top + 20:.1f}" width="14" height="{bottom - top - 20:.1f}" fill="url(#scale)" stroke="{FAINT}" '
               'stroke-width="0.5"/>')
        yield text_svg(trace.colorbar.title.text or "", self.width - 14, top + 8, 11, FAINT, "end")
        scale = Scale(*ends, bottom, top + 20)
        for value, text in zip(trace.colorbar.tickvals or (), trace.colorbar.ticktext or ()):
            yield text_svg(text, x + 20, scale.at(value) + 4, TICK_SIZE, FAINT)


# ---------------------------------------------------------------------------------------------------------- traces


def _extent(trace: Any, letter: str) -> Iterator[float]:
    values = [value for value in trace[letter] if value is not None]
    yield from values
    if letter == "y" and trace.error_y.array is not None:
        yield from (value + up for value, up in zip(values, trace.error_y.array))
        yield from (value - down for value, down in zip(values, _down(trace)))


def _down(trace: Any) -> Sequence[float]:
    return trace.error_y.array if trace.error_y.arrayminus is None else trace.error_y.arrayminus


def _scatter(trace: Any, panel: Panel) -> Iterator[str]:
    points = [None if x is None or y is None else (panel.x_scale.at(x), panel.y_scale.at(y)) for x, y in zip(trace.x, trace.y)]
    mode = trace.mode or "lines"
    if trace.fill == "toself":
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in filter(None, points))
        yield (f'<polygon points="{corners}" {_paint("fill", trace.fillcolor)} stroke="{trace.line.color or "none"}" '
               f'stroke-width="{trace.line.width or 0:g}"/>')
    elif "lines" in mode:
        path = "".join(f"{'M' if i == 0 or points[i - 1] is None else 'L'}{point[0]:.2f} {point[1]:.2f}"
                       for i, point in enumerate(points) if point)
        yield (f'<path d="{path}" fill="none" {_paint("stroke", trace.line.color)} stroke-width="{trace.line.width or 2:g}" '
               f'stroke-linejoin="round"{_dashed(trace.line.dash)}/>')
    if trace.error_y.array is not None:
        for x, y, up, down in zip(trace.x, trace.y, trace.error_y.array, _down(trace)):
            yield _line(panel.x_scale.at(x), panel.y_scale.at(y - down), panel.x_scale.at(x), panel.y_scale.at(y + up),
                        trace.error_y.color, trace.error_y.thickness or 1.5)
    if "markers" in mode:
        symbols = trace.marker.symbol if isinstance(trace.marker.symbol, tuple) else ["circle"] * len(points)
        yield from (_dot(*point, (trace.marker.size or 6) / 2, trace.marker.color, symbol == "circle-open")
                    for point, symbol in zip(points, symbols) if point)


def _bars(traces: Sequence[Any], layout: Any) -> Iterator[Shape]:
    """As plotly would: stacked, or each from its base."""
    heights: dict[float, float] = defaultdict(float)
    for trace in traces:
        if trace.type != "bar":
            continue
        lies = trace.orientation == "h"
        places, lengths = (trace.y, trace.x) if lies else (trace.x, trace.y)
        bases = trace.base if trace.base is not None else [None] * len(places)
        half = (trace.width or 1 - (layout.bargap or 0.2)) / 2
        for place, length, base in zip(places, lengths, bases):
            begin = base if base is not None else heights[place] if layout.barmode == "stack" else 0.0
            if base is None:
                heights[place] += length
            ends = (begin, begin + length), (place - half, place + half)
            (x0, x1), (y0, y1) = ends if lies else ends[::-1]
            yield Shape(trace, x0, x1, y0, y1, trace.marker.color)


def _cells(traces: Sequence[Any]) -> Iterator[Shape]:
    for trace in traces:
        if trace.type == "heatmap":
            for y, values, texts in zip(trace.y, trace.z, trace.text):
                for x, value, text in zip(trace.x, values, texts):
                    if value is not None:
                        share = (value - trace.zmin) / (trace.zmax - trace.zmin)
                        yield Shape(trace, x - 0.5, x + 0.5, y - 0.5, y + 0.5, colour_at(trace.colorscale, share), text)


def colour_at(scale: Sequence[tuple[float, str]], share: float) -> str:
    """Between the two nearest colours of a scale of shares and "#rrggbb", as "#rrggbb"."""
    share = min(max(share, scale[0][0]), scale[-1][0])
    (low, one), (high, other) = next((a, b) for a, b in pairwise(scale) if share <= b[0])
    part = (share - low) / (high - low)
    return "#" + "".join(f"{round(int(one[i:i + 2], 16) * (1 - part) + int(other[i:i + 2], 16) * part):02x}" for i in (1, 3, 5))


def readable_on(fill: str) -> str:
    """Dark text, or white where the ground is dark."""
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else PAPER


# ----------------------------------------------------------------------------------------------------------- parts


def _axis_name(reference: str) -> str:
    """ "x2" is layout.xaxis2."""
    return f"{reference[0]}axis{reference[1:]}"


def _ticks(axis: Any, scale: Scale) -> list[tuple[float, str]]:
    """Pixels and texts."""
    if axis.tickvals is not None:
        texts = axis.ticktext if axis.ticktext is not None else [number(value, axis.tickformat) for value in axis.tickvals]
        low, high = sorted((scale.low, scale.high))
        return [(scale.at(value), text) for value, text in zip(axis.tickvals, texts) if low <= value <= high]
    return [(scale.at(value), number(value, axis.tickformat)) for value in scale.ticks(int(abs(scale.end - scale.start) / TICK_PX))]


def _panel_tag(key: tuple[str, str], panel: Panel, number_: int) -> str:
    """Its scales with it, so that a reader can tell values from pixels."""
    said = " ".join(f'data-{letter}="{scale}"' for letter, scale in (("x", panel.x_scale), ("y", panel.y_scale)))
    return f'<g class="panel" id="{"".join(key)}" {said} clip-path="url(#panel{number_})">'


def _rect(shape: Shape, panel: Panel) -> str:
    (x0, x1), (y0, y1) = (sorted((scale.at(a), scale.at(b))) for scale, a, b in (
        (panel.x_scale, shape.x0, shape.x1), (panel.y_scale, shape.y0, shape.y1)))
    return f'<rect x="{x0:.2f}" y="{y0:.2f}" width="{x1 - x0:.2f}" height="{y1 - y0:.2f}" {_paint("fill", shape.fill)}/>'


def _dot(x: float, y: float, radius: float, colour: str, is_hollow: bool) -> str:
    paint = f'fill="{PAPER}" {_paint("stroke", colour)} stroke-width="1.5"' if is_hollow else _paint("fill", colour)
    return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{radius:g}" {paint}/>'


def _legend_mark(trace: Any, x: float, y: float) -> str:
    if trace.type == "bar":
        return f'<rect x="{x + 8:.1f}" y="{y - 6:.1f}" width="14" height="12" {_paint("fill", trace.marker.color)}/>'
    mode = trace.mode or "lines"
    line = _line(x, y, x + 24, y, trace.line.color, 2, trace.line.dash) if "lines" in mode else ""
    return line + (_dot(x + 12, y, 3, trace.marker.color, False) if "markers" in mode else "")


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, width: float = 1, dash: str | None = None) -> str:
    return (f'<line x1="{x0:.2f}" y1="{y0:.2f}" x2="{x1:.2f}" y2="{y1:.2f}" {_paint("stroke", colour)} stroke-width="{width:g}"'
            f'{_dashed(dash)}/>')


def _dashed(dash: str | None) -> str:
    return f' stroke-dasharray="{DASHES[dash]}"' if dash in DASHES else ""


def _paint(what: str, colour: str | None) -> str:
    """A colour as attributes: what reads SVG outside of browsers does not all know rgba()."""
    match = re.fullmatch(r"rgba\((\d+),(\d+),(\d+),([\d.]+)\)", colour or "none")
    if not match:
        return f'{what}="{colour or "none"}"'
    red, green, blue, opacity = match.groups()
    return f'{what}="#{int(red):02x}{int(green):02x}{int(blue):02x}" {what}-opacity="{opacity}"'
