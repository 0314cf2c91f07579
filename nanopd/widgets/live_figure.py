"""What is seen of a load while it is served: decisions, TTFT, TPOT, queue, tokens a second; live or replayed.

A change of the figure belongs in a `with figure.batch_update():` of whoever has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import median, quantiles

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nanopd.widgets.live_load import Picture, Seen
from nanopd.widgets.player import FAINT, FONT, INK, PAPER
from nanopd.widgets.strings import t

WAYS = {"collocated": "#0072b2", "disaggregated": "#e69f00"}  # and their colours
PLACES = {"sent": (1, 1), "ttft": (2, 1), "tpot": (2, 2), "queue": (3, 1), "rate": (3, 2)}  # row, column of the figure
TRACES = [*(f"{name} {way}" for name in ("sent", "ttft", "tpot") for way in WAYS), "queue", "rate"]  # the figure's, in this order
SHOWN = 60.0  # seconds


def draw(figure: go.Figure, picture: Picture, span: float = SHOWN) -> None:
    """Bring a figure of `bare_figure` up to the latest `span` seconds of a picture."""
    begin = max(0.0, picture.elapsed - span)
    traces = dict(zip(TRACES, figure.data, strict=True))
    recent = [seen for seen in picture.requests if (seen.finish or picture.elapsed) >= begin]
    for way in WAYS:
        taken = [seen for seen in recent if seen.mode == way]
        traces[f"sent {way}"].update(x=[seen.sent for seen in taken], y=[seen.prompt_len for seen in taken],
                                     hovertext=[_described(seen) for seen in taken])
        for name in ("ttft", "tpot"):
            points = [(seen.finish, 1e3 * getattr(seen, name)) for seen in taken if getattr(seen, name) is not None
                      and seen.finish is not None]
            traces[f"{name} {way}"].update(x=[x for x, _ in points], y=[y for _, y in points])
    samples = [sample for sample in picture.samples if sample.time >= begin]
    traces["queue"].update(x=[sample.time for sample in samples], y=[sample.queue for sample in samples])
    traces["rate"].update(x=[sample.time for sample in samples], y=[sample.rate for sample in samples])
    figure.update_xaxes(range=[begin, begin + span])


def state_of(picture: Picture) -> str:
    """A picture in words; HTML."""
    recent = [seen for seen in picture.requests if seen.finish is not None and seen.finish >= picture.elapsed - SHOWN]
    said = t("live.state", elapsed=f"{picture.elapsed:.0f}", open=picture.num_open, finished=picture.num_finished,
             ttft=_middle_and_tail([seen.ttft for seen in recent]), tpot=_middle_and_tail([seen.tpot for seen in recent]))
    return said + t("live.turned_away", n=picture.num_turned_away) if picture.num_turned_away else said


def still(figure: go.Figure, lines: Sequence[str]) -> go.Figure:
    """The figure as it is now, static, with lines of words above it."""
    title = {"text": "<br>".join(lines), "font_size": 13, "x": 0.01, "xanchor": "left", "yref": "container", "y": 0.98, "yanchor": "top"}
    return go.Figure(figure.to_plotly_json()).update_layout(margin_t=52 + 18 * len(lines), height=figure.layout.height + 18 * len(lines),
                                                            title=title)


def _middle_and_tail(seconds: list[float | None]) -> str:
    values = [1e3 * value for value in seconds if value is not None]
    if len(values) < 2:
        return "–"
    return f"{median(values):,.0f} / {quantiles(values, n=10)[-1]:,.0f}"


def _described(seen: Seen) -> str:
    said = t("live.decision", request=escape(seen.request_id), tokens=seen.prompt_len, way=t(f"live.{seen.mode}"),
             path=escape(seen.path or "…"))
    costs = [t("live.cost", way=t(f"live.{way}"), own=f"{1e3 * own:,.0f}", others=f"{1e3 * others:,.0f}")
             for way, (own, others) in seen.expected.items()]
    return said + t("live.expected", costs=" · ".join(costs)) if costs else said


def bare_figure() -> go.Figure:
    """With nothing in it yet."""
    titles = [t(f"live.{name}_title") for name in PLACES]
    figure = make_subplots(rows=3, cols=2, specs=[[{"colspan": 2}, None], [{}, {}], [{}, {}]], subplot_titles=titles,
                           row_heights=[0.4, 0.3, 0.3], vertical_spacing=0.11, horizontal_spacing=0.07)
    for name in ("sent", "ttft", "tpot"):
        for way, colour in WAYS.items():
            figure.add_trace(go.Scatter(
                mode="markers", name=t(f"live.{way}"), legendgroup=way, showlegend=name == "sent",
                marker={"color": colour, "size": 9 if name == "sent" else 6, "symbol": "circle" if way == "collocated" else "diamond"},
                hovertemplate="%{hovertext}<extra></extra>" if name == "sent" else "%{y:,.0f}<extra></extra>"), *PLACES[name])
    for name in ("queue", "rate"):
        figure.add_trace(go.Scatter(mode="lines", line={"color": INK, "width": 2, "shape": "hv"}, showlegend=False,
                                    hovertemplate="%{y:,.0f}<extra></extra>"), *PLACES[name])
    figure.update_annotations(font={"size": 12, "color": FAINT})
    figure.update_xaxes(range=[0, SHOWN], gridcolor="#e5e7eb", zeroline=False, tickfont_color=FAINT)
    figure.update_xaxes(title={"text": t("live.time_axis"), "font_color": FAINT}, row=3)
    figure.update_yaxes(rangemode="tozero", gridcolor="#e5e7eb", zeroline=False, tickfont_color=FAINT)
    return figure.update_layout(
        height=560, font={"family": FONT, "color": INK, "size": 12}, plot_bgcolor=PAPER, paper_bgcolor=PAPER,
        margin={"l": 10, "r": 10, "t": 44, "b": 46}, legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.04,
                                                           "yanchor": "bottom"})
