"""How all figures look, and what each is stamped with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nanopd.benchmark.report.text import text_width
from nanopd.benchmark.report.words import w
from nanopd.widgets.player import FAINT, FONT, INK, PAPER

GRID = "#e5e7eb"
MODE_COLOURS = {"collocated": "#0072b2", "disaggregated": "#d55e00", "adaptive": "#009e73"}
MORE_COLOURS = ("#cc79a7", "#e69f00", "#56b4e9", "#6a51a3", "#8a6d3b")
DIVERGING = [[0.0, "#0072b2"], [0.5, "#f7f7f7"], [1.0, "#d55e00"]]  # collocated, neither, disaggregated
SHARES = [[0.0, "#f7f7f7"], [1.0, "#d55e00"]]
PANEL_PX = 300  # height of a row of panels
WIDTH, HEAD_PX, FOOT_PX = 960, 112, 56
LEGEND_ROW, LEGEND_MARK, LEGEND_GAP = 20, 30, 16


def panels(rows: int, columns: int, titles: list[str], **options: Any) -> go.Figure:
    """An empty figure of so many panels, their titles in reading order."""
    options = {"horizontal_spacing": 0.22 / columns, "vertical_spacing": 0.3 / rows} | options
    return make_subplots(rows, columns, subplot_titles=titles, **options)


def finish(figure: go.Figure, title: str, source: str, rows: int = 1, simulated: bool = False) -> go.Figure:
    """Give a figure its look, and the line that says where its numbers come from."""
    title = title[:1].upper() + title[1:]
    stamp = f"{source} · <b>{w('stamp.simulated')}</b>" if simulated else source
    axis = {"gridcolor": GRID, "linecolor": FAINT, "zeroline": False, "tickfont_color": FAINT, "title_font_color": FAINT,
            "title_standoff": 6}
    figure.update_xaxes(axis)
    figure.update_yaxes(axis, automargin=True)
    figure.update_annotations(font_size=13)
    head = HEAD_PX + (_legend_rows(figure) - 1) * LEGEND_ROW
    height = head + FOOT_PX + rows * PANEL_PX
    return figure.update_layout(
        title={"text": f"<b>{title}</b>", "subtitle": {"text": stamp, "font": {"size": 12, "color": FAINT}}, "font_size": 16,
               "x": 0.01, "xanchor": "left", "y": 1 - 26 / height, "yanchor": "top", "yref": "container"},
        height=height, width=WIDTH, autosize=True, margin={"l": 66, "r": 24, "t": head, "b": FOOT_PX},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1 - 66 / height, "yref": "container", "yanchor": "top"},
        font={"family": FONT, "color": INK, "size": 12}, paper_bgcolor=PAPER, plot_bgcolor=PAPER, bargap=0.25,
        barmode=figure.layout.barmode or "stack")


def stroke(colour: str, dash: str = "solid") -> dict[str, Any]:
    """A line with a dot at each of its points."""
    return {"mode": "lines+markers", "line": {"color": colour, "dash": dash, "width": 2}, "marker": {"color": colour, "size": 6}}


def dots(colour: str, size: float = 5) -> dict[str, Any]:
    """Pale ones: there are many."""
    return {"mode": "markers", "marker": {"color": faded(colour, 0.45), "size": size}, "showlegend": False}


def in_order(values: Sequence[Any], texts: Iterable[str]) -> dict[str, Any]:
    """An axis that has its values side by side, however far they are apart, and a text at each."""
    return {"tickvals": list(range(len(values))), "ticktext": list(texts)}


def advantage_map(figure: go.Figure, lead: list[list[float | None]], text: list[list[str]]) -> None:
    """A cell for each lead of disaggregated over collocated, from -1 to 1; None where there is nothing to compare."""
    figure.add_heatmap(x=list(range(len(lead[0]))), y=list(range(len(lead))), z=lead, text=text, texttemplate="%{text}",
                       zmin=-1, zmax=1, colorscale=DIVERGING,
                       colorbar={"title": {"text": w("advantage")}, "tickvals": [-1, 0, 1], "ticktext": ["−100%", "0", "+100%"]})
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)


def _legend_rows(figure: go.Figure) -> int:
    names = [trace.name for trace in figure.data if trace.showlegend is not False and trace.name and trace.type != "heatmap"]
    return 1 + int(sum(text_width(name, 12) + LEGEND_MARK + LEGEND_GAP for name in names) // (WIDTH - 32))


def faded(colour: str, opacity: float) -> str:
    """ "#0072b2" as an rgba() text."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
