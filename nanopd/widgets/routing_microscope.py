"""The routing microscope: of one request, what each way was expected to cost, by term, and what the way it took has cost.

What the other way would have cost nobody knows: it was not taken. So its regret is an estimate, and is called one.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nanopd.router.explain import TERMS, Explanation
from nanopd.router.routing import Score
from nanopd.widgets.figure import Panel
from nanopd.widgets.live_figure import WAYS
from nanopd.widgets.player import FAINT, FONT, INK, PAPER
from nanopd.widgets.strings import t

COLOURS = {"waited": "#9ca3af", "queue": "#56b4e9", "prefill": "#0072b2", "transfer": "#d55e00", "handover": "#cc79a7",
           "decode": "#009e73", "interference": "#f0e442", "others": "#6b7280"}
BARS = (*TERMS, "others")
SHOWN = 300  # requests, the latest


class RoutingMicroscope(Panel):
    """Requests on the left, each where it came and how long it took; on the right the one that was picked, by a click or from the
    list: a bar for the best of either way as it was forecast, and one for what was measured.

    Args:
        explanations: as `Cluster.explain` gives them, of requests that have ended.
    """

    def __init__(self, explanations: Iterable[Explanation]) -> None:
        ended = [one for one in explanations if one.measured.e2e is not None][-SHOWN:]
        self.explanations = {one.question.request_id: one for one in ended}
        self.picker = widgets.Dropdown(
            description=t("microscope.request"), options=[(_title(one), name) for name, one in self.explanations.items()],
            style={"description_width": "initial"}, layout=widgets.Layout(width="auto"))
        self.picker.add_class("nanopd-pick")
        self.message = widgets.HTML()
        super().__init__(self._bare_figure(), above=[self.picker, self.message])
        self.add_class("nanopd-routing-microscope")
        self.names = {way: [name for name, one in self.explanations.items() if way_of(one) == way] for way in WAYS}
        self.view.on_click(self._clicked)
        self.picker.observe(lambda _: self._redraw(), names="value")
        self._redraw()

    def pick(self, request_id: str) -> None:
        """Raises KeyError where there is no such request."""
        if request_id not in self.explanations:
            raise KeyError(f"no request {request_id!r} here; there are {', '.join(self.explanations) or 'none'}")
        self.picker.value = request_id

    @property
    def sentence(self) -> str:
        """What came of the request that was picked, in words; HTML."""
        if self.picker.value is None:
            return t("microscope.empty")
        one = self.explanations[self.picker.value]
        said = t("microscope.took", request=escape(one.question.request_id), tokens=one.question.prompt_len,
                 path=escape(one.measured.path), e2e=_ms(one.measured.e2e))
        if one.chosen is None:
            return said + t("microscope.no_scores")
        said += t("microscope.expected", e2e=_ms(one.chosen.e2e), hindsight=_ms(at_real_length(one, one.chosen)))
        other = best_other(one)
        if other is None:
            return said + t("microscope.no_other")
        return said + t("microscope.regret", other=escape(str(other.route)), hindsight=_ms(at_real_length(one, other)),
                        regret=f"{1e3 * regret(one):+,.1f}")

    def snapshot(self) -> go.Figure:
        """What is shown now as a static figure, with the line of words as its title."""
        figure = go.Figure(self.figure.to_plotly_json())
        title = {"text": self.sentence, "font_size": 12, "x": 0.01, "xanchor": "left", "yref": "container", "y": 0.99,
                 "yanchor": "top"}
        return figure.update_layout(margin_t=130, height=figure.layout.height + 80, title=title)

    def _clicked(self, trace: int, point: int) -> None:
        ways = list(WAYS)  # a trace each, and then those that cannot be picked from
        if trace < len(ways):
            self.pick(self.names[ways[trace]][point])

    def _redraw(self) -> None:
        with self.figure.batch_update():
            self._draw()
        self.message.value = self.sentence

    def _draw(self) -> None:
        one = self.explanations.get(self.picker.value)
        rows = [] if one is None else [
            *((f"{score.route}{' ✓' if score is one.chosen else ''}", score.terms) for score in map(one.best, WAYS) if score),
            (t("microscope.measured"), one.measured.terms)]
        picked, *bars = self.figure.data[len(WAYS):]
        for name, bar in zip(BARS, bars, strict=True):
            bar.update(y=[label for label, _ in rows], x=[1e3 * terms.get(name, 0.0) for _, terms in rows])
        x, y = ([one.question.arrival - self._begin], [1e3 * one.measured.e2e]) if one else ([], [])
        picked.update(x=x, y=y)

    @property
    def _begin(self) -> float:
        return min((one.question.arrival for one in self.explanations.values()), default=0.0)

    def _bare_figure(self) -> go.Figure:
        figure = make_subplots(rows=1, cols=2, column_widths=[0.36, 0.64], horizontal_spacing=0.12,
                               subplot_titles=[t("microscope.requests_title"), t("microscope.terms_title")])
        for way, colour in WAYS.items():
            taken = [one for one in self.explanations.values() if way_of(one) == way]
            figure.add_trace(go.Scatter(
                x=[one.question.arrival - self._begin for one in taken], y=[1e3 * one.measured.e2e for one in taken], mode="markers",
                marker={"color": colour, "size": 9, "symbol": "circle" if way == "collocated" else "diamond"},
                name=t(f"live.{way}"), hovertext=[escape(_title(one)) for one in taken],
                hovertemplate="%{hovertext}<extra></extra>"), 1, 1)
        figure.add_trace(go.Scatter(mode="markers", marker={"size": 17, "color": "rgba(0,0,0,0)", "line": {"width": 2.5, "color": INK}},
                                    hoverinfo="skip", showlegend=False), 1, 1)
        for name in BARS:
            figure.add_trace(go.Bar(
                orientation="h", name=t(f"microscope.{name}"),
                marker={"color": COLOURS[name], "pattern": {"shape": "/" if name == "others" else "", "fgcolor": PAPER}},
                hovertemplate="%{x:,.1f} ms<extra>%{fullData.name}</extra>"), 1, 2)
        axis = {"gridcolor": "#e5e7eb", "zeroline": False, "tickfont_color": FAINT, "rangemode": "tozero"}
        figure.update_xaxes(**axis).update_yaxes(**axis)
        figure.update_xaxes(title={"text": t("microscope.arrival_axis"), "font_color": FAINT}, col=1)
        figure.update_xaxes(title={"text": t("microscope.terms_axis"), "font_color": FAINT}, col=2)
        figure.update_yaxes(autorange="reversed", tickfont_color=INK, automargin=True, col=2)
        figure.update_annotations(font={"size": 12, "color": FAINT})
        return figure.update_layout(
            barmode="stack", height=380, font={"family": FONT, "color": INK, "size": 12}, plot_bgcolor=PAPER, paper_bgcolor=PAPER,
            margin={"l": 10, "r": 10, "t": 40, "b": 90},
            legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.22, "yanchor": "top", "traceorder": "normal"})


def way_of(one: Explanation) -> str:
    return one.decision.route.mode


def best_other(one: Explanation) -> Score | None:
    """The best route of the way that was not taken, as it was forecast."""
    return next((score for way in WAYS if way != way_of(one) and (score := one.best(way))), None)


def at_real_length(one: Explanation, score: Score) -> float:
    """The seconds that a route was forecast to take for an answer of the length that it turned out to have."""
    measured = one.measured
    steps = (measured.e2e - measured.ttft) / measured.tpot if measured.tpot else 0.0
    return score.ttft + score.tpot * steps


def regret(one: Explanation) -> float | None:
    """An estimate, in seconds: what the request took, less what the best route of the other way was forecast to take for as long
    an answer. Above 0, the other way might have been quicker for it. None where there was no other way."""
    other = best_other(one)
    return None if other is None else one.measured.e2e - at_real_length(one, other)


def _title(one: Explanation) -> str:
    return t("microscope.title", request=one.question.request_id, tokens=one.question.prompt_len, path=one.measured.path)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"
