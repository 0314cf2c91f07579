"""The cost-model explorer: five sliders, a request and a load; which path is cheaper, of what its time is made, and how far
predictions are from what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.fit import error_quantile
from nanopd.cost_model.measurements import DecodeRow, Measurement, MixedRow, PrefillRow
from nanopd.cost_model.presets import preset, preset_names
from nanopd.cost_model.profile import Profile
from nanopd.cost_model.seed import SeedModel, seed_preset, seed_preset_names
from nanopd.widgets.figure import Panel
from nanopd.widgets.path_costs import MODES, TERMS, FittedModel, FiveParameters, PathCosts, Request, five_of
from nanopd.widgets.player import FAINT, FONT, INK, PAPER
from nanopd.widgets.roofline import _si
from nanopd.widgets.strings import t

TERM_COLOURS = {"prefill": "#0072b2", "transfer": "#009e73", "decode": "#56b4e9", "interference": "#d55e00", "others": "#e69f00"}
# Collocated, equal, disaggregated; what is hardly cheaper can still be told from its contrary.
CHEAPER_COLOURS = [[0, "#0072b2"], [0.4999, "#cfe3f1"], [0.5, "#f3f4f6"], [0.5001, "#fbdfcf"], [1, "#d55e00"]]
FULL_COLOUR = 0.5  # the logarithm to base 2 of a ratio of times
PROMPTS = [2**k for k in range(4, 16)]
OUTPUTS = [2**k for k in range(11)]
LOADS = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
PARAMETERS = {"alpha_ms_per_token": (-4, 2), "beta_ms": (-2, 3), "gamma_ms_per_token": (-4, 2), "bandwidth_gb_s": (-3, 4)}
FIVE, FITTED = "five", "fitted"  # the models to choose from
ROWS = {"prefill": PrefillRow, "decode": DecodeRow, "mixed": MixedRow}  # the lower three plots, from left to right
# The figure's traces: map, sliders' place, a bar for each term, then of each of ROWS what is predicted and what was measured.
MAP, HERE, BARS = 0, 1, 2
PLOTS = BARS + len(TERMS)
PREDICTED, MEASURED = range(2)


class CostModelExplorer(Panel):
    """Sliders for the seed's five parameters, a request and a load; which path is predicted to be cheaper, and of what it is made.

    Predictions are drawn as open circles and bars, what was measured as filled diamonds under the device's name and date.

    Args:
        profile: a measured machine, offered and shown first, beside the presets.

    Raises:
        CostModelError: nothing was transferred in the profile, so that one of its paths can't be predicted.
    """

    def __init__(self, profile: Profile | None = None) -> None:
        profiles = [*([profile] if profile else []), *(preset(name) for name in preset_names())]
        self.profiles = {_title(each): each for each in profiles}
        self.seeds = {name.replace("-", " ").upper(): seed_preset(name) for name in reversed(seed_preset_names())}
        self.bytes_per_token = 0.0
        self.message = widgets.HTML()
        self._make_controls()
        super().__init__(self._bare_figure(), above=[*self._control_rows(), self.message])
        self.add_class("nanopd-cost-model-explorer")
        self._is_moving = False
        self.load(_title(profile) if profile else next(iter(self.seeds)))

    # What is shown

    @property
    def five(self) -> SeedModel:
        """As the sliders stand."""
        return SeedModel(**{name: slider.value for name, slider in self.parameters.items()}, bytes_per_token=self.bytes_per_token)

    @property
    def request(self) -> Request:
        return Request(*(slider.value for slider in self.sliders.values()))

    @property
    def profile(self) -> Profile | None:
        """What the points are from; None with published parameters, for which no points were published."""
        return self.profiles.get(self.source.value)

    @property
    def costs(self) -> PathCosts:
        """What predicts."""
        if self.model_buttons.value == FITTED and self.profile is not None:
            return FittedModel(self.profile.cost)
        return FiveParameters(self.five)

    @property
    def seconds(self) -> dict[str, float]:
        """What a request takes in all, by mode."""
        return {mode: sum(terms.values()) for mode, terms in self.costs.paths(self.request).items()}

    def rows(self, quantity: str) -> list[Measurement]:
        return list(getattr(self.profile.measurements, quantity)) if self.profile else []

    def errors(self, quantity: str) -> list[float]:
        """Predicted / measured - 1 of each row: "prefill", "decode" or "mixed"."""
        costs = self.costs
        return [costs.row_seconds(row) / row.seconds - 1 for row in self.rows(quantity)]

    # What changes it

    def load(self, source: str) -> None:
        """Set the five sliders to a preset's or a profile's, by its name in the list, and show that profile's points."""
        if source not in self.source.options:
            raise CostModelError(f"there is nothing called {source!r} here; there is {', '.join(self.source.options)}")
        profile = self.profiles.get(source)
        five = five_of(profile) if profile else self.seeds[source]
        self.bytes_per_token = five.bytes_per_token
        self._move({self.source: source} | {slider: getattr(five, name) for name, slider in self.parameters.items()})

    def show(self, model: str | None = None, **values: float) -> None:
        """Move the controls: show(model="fitted", prompt=1024, output=128, load=8, gamma_ms_per_token=0.01)."""
        chosen = {self.model_buttons: model} if model is not None else {}
        self._move(chosen | {(self.parameters | self.sliders)[name]: value for name, value in values.items()})

    def _move(self, values: dict[widgets.Widget, object]) -> None:
        """Many controls, and draw once."""
        self._is_moving = True
        try:
            for control, value in values.items():
                control.value = value
        finally:
            self._is_moving = False
        self._redraw()

    @property
    def sentence(self) -> str:
        """Where it is from, and what follows; HTML."""
        lines = [self._badge()]
        seconds, five = self.seconds, self.five
        cheaper = min(seconds, key=seconds.__getitem__)
        lines.append(t("costs.verdict", collocated=f"{_si(seconds[MODES[0]])}s", disaggregated=f"{_si(seconds[MODES[1]])}s",
                       cheaper=t(f"costs.{cheaper}"), ms=f"{1e3 * (max(seconds.values()) - min(seconds.values())):.3g}"))
        if isinstance(self.costs, FiveParameters):
            lines.append(t("costs.rule", ratio=f"{five.gamma_over_transfer_rate:.3g}", load=five.crossover_load))
        errors = {quantity: self.errors(quantity) for quantity in ROWS}
        medians = [f"{t(f'costs.{quantity}')} {100 * error_quantile(of, 0.5):.0f}%" for quantity, of in errors.items() if of]
        lines += [t("costs.errors", errors=" · ".join(medians))] if medians else []
        return "<br>".join(lines)

    def _badge(self) -> str:
        profile = self.profile
        if profile is None:
            return t("costs.published", source=escape(self.source.value))
        badge = t("costs.measured", source=escape(_title(profile)), date=profile.date[:10])
        return badge + (t("costs.no_mixed") if not profile.measurements.mixed else "")

    def snapshot(self) -> go.Figure:
        """What is shown now as a static figure, with the words as its title."""
        figure = go.Figure(self.figure.to_plotly_json())
        figure.update_layout(title={"text": self.sentence, "font_size": 12, "x": 0.01, "xanchor": "left",
                                    "yref": "container", "y": 0.98, "yanchor": "top"})
        extra = 18 * (2 + self.sentence.count("<br>"))
        return figure.update_layout(margin_t=figure.layout.margin.t + extra, height=figure.layout.height + extra)

    # Controls

    def _make_controls(self) -> None:
        self.source = widgets.Dropdown(options=[*self.profiles, *self.seeds], description=t("costs.source"),
                                       style={"description_width": "auto"})
        self.model_buttons = widgets.ToggleButtons(options=[(t("costs.five"), FIVE), (t("costs.fitted"), FITTED)],
                                                   style={"button_width": "auto"})
        self.parameters: dict[str, widgets.Widget] = {
            name: _small(widgets.FloatLogSlider, t(f"costs.{name}"), min=low, max=high, step=0.001, readout_format=".3g")
            for name, (low, high) in PARAMETERS.items()}
        self.parameters["batch_thresh"] = _small(widgets.IntSlider, t("costs.batch_thresh"), min=1, max=256)
        starts = {"prompt": (PROMPTS, 1024), "output": (OUTPUTS, 128), "load": (LOADS, 4)}
        self.sliders = {name: _small(widgets.SelectionSlider, t(f"costs.{name}"), value=start,
                                     options=[(f"{value:,}", value) for value in values])
                        for name, (values, start) in starts.items()}
        for name, control in (self.parameters | self.sliders).items():
            control.add_class(f"nanopd-{name.replace('_', '-')}")
            control.observe(self._unless_moving(self._redraw), names="value")
        self.model_buttons.observe(self._unless_moving(self._redraw), names="value")
        self.source.observe(self._unless_moving(lambda: self.load(self.source.value)), names="value")

    def _unless_moving(self, action: Callable[[], None]) -> Callable[[object], None]:
        return lambda _: None if self._is_moving else action()

    def _control_rows(self) -> list[widgets.HBox]:
        wrap = widgets.Layout(flex_flow="row wrap", align_items="center")
        return [widgets.HBox([self.source, self.model_buttons], layout=wrap),
                widgets.HBox([*self.sliders.values()], layout=wrap), widgets.HBox([*self.parameters.values()], layout=wrap)]

    # Drawing

    def _redraw(self) -> None:
        self.model_buttons.disabled = self.profile is None
        for control in self.parameters.values():
            control.disabled = isinstance(self.costs, FittedModel)
        with self.figure.batch_update():
            self._draw_map()
            self._draw_bars()
            for place, quantity in enumerate(ROWS):
                self._draw_rows(place, quantity)
        self.message.value = self.sentence

    def _draw_map(self) -> None:
        """The logarithm of how much longer collocated takes: 1 is twice as long."""
        costs, here = self.costs, self.request
        z = [[self._log_ratio(costs, replace(here, prompt_tokens=prompt, load=load)) for prompt in PROMPTS] for load in LOADS]
        ratios = [[_times(value) for value in row] for row in z]
        self.figure.data[MAP].update(z=z, customdata=ratios)
        self.figure.data[HERE].update(x=[f"{here.prompt_tokens:,}"], y=[str(here.load)])

    @staticmethod
    def _log_ratio(costs: PathCosts, request: Request) -> float:
        collocated, disaggregated = (sum(terms.values()) for terms in costs.paths(request).values())
        return math.log2(collocated / disaggregated)

    def _draw_bars(self) -> None:
        paths = self.costs.paths(self.request)
        for place, term in enumerate(TERMS):
            self.figure.data[BARS + place].x = [1e3 * paths[mode].get(term, 0.0) for mode in MODES]

    def _draw_rows(self, place: int, quantity: str) -> None:
        first, title = PLOTS + 2 * place, t(f"costs.{quantity}_title")
        rows, errors = self.rows(quantity), self.errors(quantity)
        x = [_axis_value(row) for row in rows]
        told = [_told(row) for row in rows]
        self.figure.data[first + PREDICTED].update(
            x=x, y=[1e3 * row.seconds * (1 + error) for row, error in zip(rows, errors)],
            hovertext=[f"{text}<br>{100 * error:+.0f}%" for text, error in zip(told, errors)])
        self.figure.data[first + MEASURED].update(x=x, y=[1e3 * row.seconds for row in rows], hovertext=told)
        self.figure.layout.annotations[2 + place].text = title if rows else t("costs.no_rows", title=title)
        for axis in ("xaxis", "yaxis"):
            self.figure.layout[f"{axis}{3 + place}"].visible = bool(rows)

    def _bare_figure(self) -> go.Figure:
        predicted = t("costs.predicted")
        figure = make_subplots(
            rows=2, cols=14, row_heights=[0.55, 0.45], vertical_spacing=0.2, horizontal_spacing=0,
            specs=[[{"colspan": 6}, *[None] * 7, {"colspan": 6}, *[None] * 5],
                   [{"colspan": 4}, *[None] * 4, {"colspan": 4}, *[None] * 4, {"colspan": 4}, *[None] * 3]],
            subplot_titles=[t("costs.map_title"), t("costs.bars_title"), *(t(f"costs.{quantity}_title") for quantity in ROWS)])
        figure.add_trace(go.Heatmap(
            x=[f"{prompt:,}" for prompt in PROMPTS], y=[str(load) for load in LOADS],
            zmin=-FULL_COLOUR, zmax=FULL_COLOUR, colorscale=CHEAPER_COLOURS, xgap=1, ygap=1, showscale=False,
            hovertemplate=f"%{{x}} × %{{y}}: %{{customdata}}<extra>{predicted}</extra>"),
            row=1, col=1)
        figure.add_trace(go.Scatter(mode="markers", marker={"size": 13, "symbol": "circle-open", "color": INK, "line_width": 3},
                                    hoverinfo="skip", showlegend=False), row=1, col=1)
        for term in TERMS:
            figure.add_trace(go.Bar(y=[t(f"costs.{mode}") for mode in MODES], orientation="h", name=t(f"costs.term_{term}"),
                                    marker_color=TERM_COLOURS[term], hovertemplate="%{x:.3g} ms<extra>%{fullData.name}</extra>"),
                             row=1, col=9)
        marks = {"mode": "markers", "hovertemplate": "%{y:.3g} ms<br>%{hovertext}<extra>%{fullData.name}</extra>"}
        for place in range(len(ROWS)):
            figure.add_trace(go.Scatter(**marks, name=predicted, showlegend=not place, legendgroup="predicted",
                                        marker={"size": 11, "symbol": "circle-open", "color": "#d55e00", "line_width": 2}),
                             row=2, col=1 + 5 * place)
            figure.add_trace(go.Scatter(**marks, name=t("costs.measured_legend"), showlegend=not place, legendgroup="measured",
                                        marker={"size": 7, "symbol": "diamond", "color": INK}), row=2, col=1 + 5 * place)
        grid = {"gridcolor": "#e5e7eb", "zeroline": False, "fixedrange": True, "tickfont_color": FAINT}
        figure.update_xaxes(**grid).update_yaxes(**grid)
        figure.update_xaxes(type="log", dtick=1, row=2).update_yaxes(type="log", dtick="D2", row=2)
        for place, quantity in enumerate(ROWS):
            figure.update_xaxes(title_text=t("costs.sequences_axis" if quantity == "decode" else "costs.tokens_axis"), row=2,
                                col=1 + 5 * place)
        figure.update_annotations(font_size=13)
        return figure.update_layout(
            autosize=True, barmode="stack", height=620, paper_bgcolor=PAPER, plot_bgcolor=PAPER,
            font={"family": FONT, "size": 12, "color": INK}, margin={"l": 60, "r": 20, "t": 36, "b": 92}, dragmode=False,
            hoverlabel={"font_family": FONT, "align": "left"},
            legend={"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "x": 0, "xref": "container",
                    "itemclick": False, "itemdoubleclick": False, "traceorder": "normal"},
            xaxis={"title_text": t("costs.prompt_axis"), "type": "category"},
            yaxis={"title_text": t("costs.load_axis"), "type": "category"},
            xaxis2={"title_text": "ms"}, yaxis2={"autorange": "reversed", "automargin": True}, yaxis3={"title_text": "ms"})


def _title(profile: Profile) -> str:
    return f"{profile.device}, {profile.model}, {profile.dtype}"


def _small(kind: type[widgets.Widget], description: str, **options: object) -> widgets.Widget:
    return kind(description=description, style={"description_width": "auto"}, layout=widgets.Layout(width="272px"), **options)


def _times(log_ratio: float) -> str:
    cheaper = MODES[log_ratio > 0]
    return t("costs.cheaper_by", cheaper=t(f"costs.{cheaper}"), share=f"{100 * (1 - 2 ** -abs(log_ratio)):.0f}")


def _axis_value(row: Measurement) -> float:
    return row.decodes if isinstance(row, DecodeRow) else row.new_tokens  # type: ignore[attr-defined]


def _told(row: Measurement) -> str:
    """What else the row was measured at."""
    if isinstance(row, PrefillRow):
        return t("costs.row_prefill", new=row.new_tokens, cached=row.cached_tokens)
    assert isinstance(row, (DecodeRow, MixedRow))
    told = t("costs.row_decode", decodes=row.decodes, context=f"{row.context_tokens / row.decodes:,.0f}")
    return f"{t('costs.row_prefill', new=row.new_tokens, cached=row.cached_tokens)}<br>{told}" if isinstance(row, MixedRow) else told
