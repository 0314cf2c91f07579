"""How all figures look, and what each is stamped with."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nanopd.benchmark.report.words import w
from nanopd.widgets.player import FAINT, FONT, INK, PAPER

GRID = "#e5e7eb"
MODE_COLOURS = {"collocated": "#0072b2", "disaggregated": "#d55e00", "adaptive": "#009e73"}
MORE_COLOURS = ("#cc79a7", "#e69f00", "#56b4e9", "#6a51a3", "#8a6d3b")
DIVERGING = [[0.0, "#0072b2"], [0.5, "#f7f7f7"], [1.0, "#d55e00"]]  # collocated, neither, disaggregated
SHARES = [[0.0, "#f7f7f7"], [1.0, "#d55e00"]]
PANEL_PX = 300  # height of a row of panels
HEAD_PX, FOOT_PX = 112, 56


def panels(rows: int, columns: int, titles: list[str], **options: Any) -> go.Figure:
    """An empty figure of so many panels, their titles in reading order."""
    options = {"horizontal_spacing": 0.22 / columns, "vertical_spacing": 0.3 / rows} | options
    return make_subplots(rows, columns, subplot_titles=titles, **options)


def finish(figure: go.Figure, title: str, source: str, rows: int = 1, simulated: bool = False) -> go.Figure:
    """Give a figure its look, and the line that says where its numbers come from."""
    stamp = f"{source} · <b>{w('stamp.simulated')}</b>" if simulated else source
    figure.update_xaxes(gridcolor=GRID, linecolor=FAINT, zeroline=False, tickfont_color=FAINT, title_font_color=FAINT, title_standoff=6)
    figure.update_yaxes(gridcolor=GRID, linecolor=FAINT, zeroline=False, tickfont_color=FAINT, title_font_color=FAINT, title_standoff=6)
    figure.update_annotations(font_size=13)
    height = HEAD_PX + FOOT_PX + rows * PANEL_PX
    return figure.update_layout(
        title={"text": f"<b>{title}</b>", "subtitle": {"text": stamp, "font": {"size": 12, "color": FAINT}}, "x": 0.01, "xanchor": "left",
               "y": 1 - 26 / height, "yanchor": "top", "yref": "container", "font_size": 16},
        height=height, width=960, autosize=True, margin={"l": 66, "r": 24, "t": HEAD_PX, "b": FOOT_PX},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1 - 66 / height, "yref": "container", "yanchor": "top"},
        font={"family": FONT, "color": INK, "size": 12}, paper_bgcolor=PAPER, plot_bgcolor=PAPER, barmode=figure.layout.barmode or "stack",
        bargap=0.25)


def faded(colour: str, opacity: float) -> str:
    """ "#0072b2" as an rgba() text."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
