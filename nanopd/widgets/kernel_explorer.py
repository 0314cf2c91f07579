"""The kernel explorer: sliders for a decode attention's shape and kernel; its bytes, its spread over the GPU, its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nanopd.widgets.figure import Panel
from nanopd.widgets.kernel_estimate import KERNELS, Device, Estimate, Measurement, Shape, estimate
from nanopd.widgets.player import FAINT, FONT, INK, PAPER
from nanopd.widgets.roofline import _si
from nanopd.widgets.strings import t

COLOURS = {"naive": "#d55e00", "grouped": "#e69f00", "split_kv": "#0072b2"}
BATCHES = [2**k for k in range(9)]
CONTEXTS = [2**k for k in range(9, 18)]
MOST_SPLITS = 64
ROOF, ESTIMATE, MEASURED, RECORDED, CURVE, FLOOR, HERE = range(7)  # the figure's traces


class KernelExplorer(Panel):
    """Sliders for the shape and the kernel; its floor, its estimate, and what was measured.

    Args:
        device: its ceilings, as measured or recorded.
        shape: where the sliders stand at first.
        measure: (kernel, shape) -> seconds on this machine's GPU; None where there is none.
        recorded: measurements made elsewhere, shown where the sliders meet their shape.
    """

    def __init__(self, device: Device, shape: Shape | None = None, *,
                 measure: Callable[[str, Shape], float] | None = None,
                 recorded: Iterable[Measurement] = ()) -> None:
        self.device = device
        self.base = shape or Shape()
        self.recorded = list(recorded)
        self.measured: list[Measurement] = []
        self._measure = measure
        self.message = widgets.HTML()
        self._make_controls()
        super().__init__(self._bare_figure(), above=[*self._rows(), self.message])
        self.add_class("nanopd-kernel-explorer")
        self._redraw()

    # What is shown

    @property
    def shape(self) -> Shape:
        return replace(self.base, **{name: control.value for name, control in self.sliders.items()})

    @property
    def kernel(self) -> str:
        return self.kernel_buttons.value

    @property
    def num_splits(self) -> int:
        return self.splits_slider.value if self.kernel == "split_kv" else 1

    @property
    def estimate(self) -> Estimate:
        return estimate(self.shape, self.device, self.kernel, self.num_splits)

    def show(self, kernel: str | None = None, num_splits: int | None = None, **shape: int) -> None:
        """Move the controls: show(kernel="split_kv", num_splits=8, batch=1, context=16384)."""
        for name, value in shape.items():
            self.sliders[name].value = value
        if kernel is not None:
            self.kernel_buttons.value = kernel
        if num_splits is not None:
            self.splits_slider.value = num_splits

    def measure(self) -> None:
        """Time the engine's kernel at this shape on this machine's GPU. Split-KV plans its splits itself."""
        if self._measure is None:
            raise RuntimeError(t("explorer.no_gpu"))
        self.measured.append(Measurement(self.kernel, self.shape, self._measure(self.kernel, self.shape)))
        self._redraw()

    def matching(self, measurements: list[Measurement]) -> dict[str, Measurement]:
        """The latest of each kernel at the shape shown; the engine's own come last, and so on top."""
        found = {m.kernel: m for m in measurements if m.shape == self.shape}
        return dict(sorted(found.items(), key=lambda item: item[0] in KERNELS))

    @property
    def sentence(self) -> str:
        """The position of the sliders in words; HTML."""
        shape, guess = self.shape, self.estimate
        lines = [t("explorer.moves", needed=_si(shape.kv_bytes), moved=_si(guess.moved),
                   times=f"{guess.moved / shape.kv_bytes:.3g}"),
                 t("explorer.spreads", ctas=f"{guess.ctas:,}", sms=self.device.num_sms, waves=f"{guess.waves:,}"),
                 t("explorer.takes", floor=_us(guess.floor), seconds=_us(guess.seconds),
                   share=f"{100 * guess.floor / guess.seconds:.0f}")]
        for kind, measurements in (("explorer.measured", self.measured), ("explorer.recorded", self.recorded)):
            found = list(self.matching(measurements).values())
            times = [f"{_name(m.kernel)} {_us(m.seconds)} ({100 * guess.floor / m.seconds:.0f}%)" for m in found]
            lines += [t(kind, source=escape(found[0].source), times=" · ".join(times))] if found else []
        return "<br>".join(lines)

    def snapshot(self) -> go.Figure:
        """What is shown now as a static figure, with the words as its title."""
        figure = go.Figure(self.figure.to_plotly_json())
        figure.update_layout(title={"text": self.sentence, "font_size": 12, "x": 0.01, "xanchor": "left",
                                    "yref": "container", "y": 0.97, "yanchor": "top"})
        extra = 18 * (2 + self.sentence.count("<br>"))
        return figure.update_layout(margin_t=figure.layout.margin.t + extra, height=figure.layout.height + extra)

    # Controls

    def _make_controls(self) -> None:
        choices = {"batch": BATCHES, "context": CONTEXTS, "kv_heads": [1, 2, 4, 8, 16], "group": [1, 2, 4, 6, 8],
                   "block_size": [8, 16, 32, 64, 128, 256]}
        self.sliders = {name: self._slider(name, values) for name, values in choices.items()}
        self.kernel_buttons = widgets.ToggleButtons(
            options=[(t(f"explorer.{kernel}"), kernel) for kernel in KERNELS], value="split_kv",
            style={"button_width": "auto"})
        self.splits_slider = widgets.IntSlider(
            value=1, min=1, max=MOST_SPLITS, description=t("explorer.num_splits"), style={"description_width": "auto"})
        self.splits_slider.add_class("nanopd-splits")
        self.measure_button = widgets.Button(
            description=t("explorer.measure"), icon="play", button_style="primary", disabled=self._measure is None,
            tooltip=t("explorer.measure_tip" if self._measure else "explorer.no_gpu"),
            layout=widgets.Layout(width="auto"))
        for control in (*self.sliders.values(), self.kernel_buttons, self.splits_slider):
            control.observe(lambda _: self._redraw(), names="value")
        self.measure_button.on_click(lambda _: self._reporting_measure())

    def _slider(self, name: str, values: list[int]) -> widgets.SelectionSlider:
        start = getattr(self.base, name)
        slider = widgets.SelectionSlider(
            options=[(f"{value:,}", value) for value in sorted({*values, start})], value=start,
            description=t(f"explorer.{name}"), style={"description_width": "auto"}, layout=widgets.Layout(width="235px"))
        slider.add_class(f"nanopd-{name.replace('_', '-')}")
        return slider

    def _rows(self) -> list[widgets.HBox]:
        wrap = widgets.Layout(flex_flow="row wrap", align_items="center")
        return [widgets.HBox([*self.sliders.values()], layout=wrap),
                widgets.HBox([self.kernel_buttons, self.splits_slider, self.measure_button], layout=wrap)]

    def _reporting_measure(self) -> None:
        """In a page, ipywidgets logs what a callback raises where hardly anybody looks: show it here too."""
        try:
            self.measure()
        except Exception as error:
            text = escape(f"{type(error).__name__}: {error}")
            self.message.value = f'<span style="color:#d55e00"><b>{text}</b></span>'
            raise

    # Drawing

    def _redraw(self) -> None:
        self.splits_slider.disabled = self.kernel != "split_kv"
        with self.figure.batch_update():
            self._draw_roofline()
            self._draw_splits()
        self.message.value = self.sentence

    def _draw_roofline(self) -> None:
        device, intensity = self.device, self.shape.flops / self.shape.kv_bytes
        ridge = device.peak_flops / device.bandwidth
        low, high = min(0.5, intensity / 2), max(4 * ridge, 4 * intensity)
        self.figure.data[ROOF].update(x=[low, ridge, high], y=[low * device.bandwidth, *[device.peak_flops] * 2])
        shown = {ESTIMATE: [Measurement(self.kernel, self.shape, self.estimate.seconds)],
                 MEASURED: [*self.matching(self.measured).values()], RECORDED: [*self.matching(self.recorded).values()]}
        for trace, points in shown.items():
            self._mark(trace, points)
        slowest = min(point.shape.flops / point.seconds for points in shown.values() for point in points)
        self.figure.layout.xaxis.range = [math.log10(low), math.log10(high)]
        top, bottom = math.log10(2 * device.peak_flops), math.log10(min(low * device.bandwidth, slowest) / 2)
        self.figure.layout.yaxis.update(
            range=[bottom, top], tickvals=[10.0**k for k in range(math.ceil(bottom), math.floor(top) + 1)],
            ticktext=[_si(10.0**k) for k in range(math.ceil(bottom), math.floor(top) + 1)])

    def _mark(self, trace: int, points: list[Measurement]) -> None:
        self.figure.data[trace].update(
            x=[point.shape.flops / point.shape.kv_bytes for point in points],
            y=[point.shape.flops / point.seconds for point in points],
            marker_color=[COLOURS.get(point.kernel, FAINT) for point in points],
            hovertext=["<br>".join(filter(None, [_name(point.kernel), _us(point.seconds), escape(point.source)]))
                       for point in points])

    def _draw_splits(self) -> None:
        splits = range(1, MOST_SPLITS + 1)
        micros = [1e6 * estimate(self.shape, self.device, "split_kv", n).seconds for n in splits]
        floor = 1e6 * self.estimate.floor
        self.figure.data[CURVE].update(x=list(splits), y=micros)
        self.figure.data[FLOOR].update(x=[1, MOST_SPLITS], y=[floor, floor])
        here = [1e6 * self.estimate.seconds]
        self.figure.data[HERE].update(x=[self.num_splits], y=here, marker_color=COLOURS[self.kernel])
        self.figure.layout.yaxis2.range = [0, 1.1 * max(*micros, *here)]

    def _bare_figure(self) -> go.Figure:
        figure = make_subplots(rows=1, cols=2, column_widths=[0.58, 0.42], horizontal_spacing=0.13)
        marks = {"mode": "markers", "hovertemplate": "%{hovertext}<extra></extra>", "cliponaxis": False}
        edge = {"color": INK, "width": 1.5}
        for column, trace in (
            (1, go.Scatter(mode="lines", line={"color": INK, "width": 3}, hoverinfo="skip", showlegend=False)),
            (1, go.Scatter(name=t("explorer.legend_estimate"), **marks, marker={"size": 12, "symbol": "circle-open", "line_width": 3})),
            (1, go.Scatter(name=t("explorer.legend_measured"), **marks, marker={"size": 13, "symbol": "star", "line": edge})),
            (1, go.Scatter(name=t("explorer.legend_recorded"), **marks, marker={"size": 11, "symbol": "diamond", "line": edge})),
            (2, go.Scatter(mode="lines", line={"color": COLOURS["split_kv"], "width": 2}, showlegend=False,
                           hovertemplate="%{x}: %{y:.3g} µs<extra></extra>")),
            (2, go.Scatter(mode="lines", line={"color": FAINT, "width": 1.5, "dash": "dot"}, showlegend=True,
                           name=t("explorer.legend_floor"), hoverinfo="skip")),
            (2, go.Scatter(mode="markers", marker={"size": 12, "symbol": "circle-open", "line_width": 3}, showlegend=False,
                           hoverinfo="skip"))):
            figure.add_trace(trace, row=1, col=column)
        grid = {"gridcolor": "#e5e7eb", "zeroline": False, "fixedrange": True, "tickfont_color": FAINT}
        figure.update_xaxes(**grid).update_yaxes(**grid)
        figure.update_layout(
            autosize=True, paper_bgcolor=PAPER, plot_bgcolor=PAPER, font={"family": FONT, "size": 12, "color": INK},
            height=360, margin={"l": 70, "r": 20, "t": 28, "b": 84}, dragmode=False,
            hoverlabel={"font_family": FONT, "align": "left"},
            legend={"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "x": 0, "xref": "container",
                    "itemclick": False, "itemdoubleclick": False},
            xaxis={"type": "log", "dtick": 1, "title_text": t("roofline.x")},
            yaxis={"type": "log", "title_text": t("roofline.y")},
            xaxis2={"title_text": t("explorer.splits_axis")}, yaxis2={"title_text": t("explorer.time_axis")})
        return figure


def _name(kernel: str) -> str:
    """Other engines' kernels were recorded too, and keep their names."""
    return t(f"explorer.{kernel}") if kernel in KERNELS else kernel


def _us(seconds: float) -> str:
    """ "61.9 µs": three digits, in the unit that suits."""
    return f"{_si(seconds)}s"
