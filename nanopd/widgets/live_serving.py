"""Live serving: a cluster under an open-loop load, with its sliders in your hand.

The load is served by `LoadDriver` in a thread; a second thread paints what it has seen a few times a second, so that the
kernel stays free. What is shown was measured here, as it is shown.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from html import escape
from statistics import median, quantiles
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from nanopd.cluster import Cluster
from nanopd.config import MODES, ConfigError, Topology
from nanopd.widgets.figure import Panel
from nanopd.widgets.live_load import MIXES, Load, LoadDriver, Picture, Seen
from nanopd.widgets.player import FAINT, FONT, INK, PAPER
from nanopd.widgets.strings import t

WAYS = {"collocated": "#0072b2", "disaggregated": "#e69f00"}  # and their colours
PLACES = {"sent": (1, 1), "ttft": (2, 1), "tpot": (2, 2), "queue": (3, 1), "rate": (3, 2)}  # row, column of the figure
TRACES = [*(f"{name} {way}" for name in ("sent", "ttft", "tpot") for way in WAYS), "queue", "rate"]  # the figure's, in this order
SHOWN = 60.0  # seconds
PAINT_EVERY = 0.4  # seconds
CHUNKS = (128, 256, 512, 1024, 2048)


class LiveServing(Panel):
    """A load on a cluster, as it is served.

    Rate, mix, output length and mode take effect with the next request; topology and chunk size with the next Start, for they
    need another cluster.

    Args:
        model: as for `Cluster`.
        topologies: to choose from. Default: what this machine has devices for.
        load: to begin with.
        options: of the cluster, such as dtype or profile.
    """

    def __init__(self, model: str = "tiny", topologies: Sequence[str] | None = None, load: Load | None = None,
                 **options: Any) -> None:
        topologies = list(topologies or topologies_here())
        load = load or Load()
        self.driver = LoadDriver(lambda: self._make_cluster(model, options), load)
        self._built: tuple[str, int] | None = None  # the settings of the cluster that there is
        self._painter = threading.Thread()
        self._make_controls(topologies, load)
        self.message = widgets.HTML(t("live.ready"))
        super().__init__(_bare_figure(), above=[*self._rows(), self.message])
        self.add_class("nanopd-live-serving")

    def _make_controls(self, topologies: list[str], load: Load) -> None:
        self.rate = _control(widgets.FloatSlider, "live.rate", value=load.rate, min=0, max=20, step=0.5)
        self.output = _control(widgets.IntSlider, "live.output", value=load.output_tokens, min=4, max=256)
        self.mix = _control(widgets.Dropdown, "live.mix", options=[(t(f"live.{mix}"), mix) for mix in MIXES], value=load.mix)
        self.mode = _control(widgets.Dropdown, "live.mode")
        self.topology = _control(widgets.Dropdown, "live.topology", options=topologies)
        self.chunk = _control(widgets.Dropdown, "live.chunk", options=CHUNKS, value=512)
        self.start_button = _button("live.start", "play", "nanopd-start", self.start, "primary")
        self.stop_button = _button("live.stop", "stop", "nanopd-stop", self.stop, "")
        self.stop_button.disabled = True
        self._offer_modes(load.mode)
        for control, field in ((self.rate, "rate"), (self.output, "output_tokens"), (self.mix, "mix"), (self.mode, "mode")):
            control.observe(lambda change, field=field: self._change(field, change["new"]), names="value")
        for control in (self.topology, self.chunk):
            control.observe(lambda _: self._resettle(), names="value")

    def _rows(self) -> list[widgets.Widget]:
        rows = [[self.rate, self.output, self.mix, self.mode],
                [self.topology, self.chunk, self.start_button, self.stop_button]]
        return [widgets.HBox(row, layout=widgets.Layout(flex_flow="row wrap", align_items="center")) for row in rows]

    # ------------------------------------------------------------------------------------------ what buttons do

    def start(self) -> None:
        """Serve, anew; on another cluster if its settings have changed."""
        if self.driver.running:
            return
        if self._built != self._settings:
            self.driver.shutdown()
        self._offer_modes(self.mode.value)
        self.driver.change(mode=self.mode.value)
        self.start_button.disabled, self.stop_button.disabled = True, False
        self.driver.start()
        self._painter = threading.Thread(target=self._paint, name="nanopd-painter", daemon=True)
        self._painter.start()

    def stop(self) -> None:
        """End what is open. The cluster stays up, until `shutdown`."""
        self.driver.stop()
        if self._painter.is_alive():
            self._painter.join()

    def shutdown(self) -> None:
        """Stop, and give the memory back."""
        self.stop()
        self.driver.shutdown()
        self._built = None

    def explain(self, request_id: str) -> Any:
        """As `Cluster.explain`, also while it serves."""
        return self.driver.call(lambda cluster: cluster.explain(request_id))

    @property
    def request_ids(self) -> list[str]:
        """Of the requests that have ended, the latest last."""
        return [seen.request_id for seen in self.driver.picture().requests if seen.finish is not None]

    def _change(self, field: str, value: Any) -> None:
        self.driver.change(**{field: value})

    def _resettle(self) -> None:
        """Other settings than the cluster has: they wait for the next Start."""
        if self.driver.running:
            self.message.value = self.sentence(self.driver.picture())
        else:
            self._offer_modes(self.mode.value)

    def _offer_modes(self, wanted: str | None) -> None:
        """Those that the topology has workers for."""
        modes = modes_of(self.topology.value)
        self.mode.options = [(t(f"live.{mode}"), mode) for mode in modes]
        self.mode.value = wanted if wanted in modes else modes[-1]

    @property
    def _settings(self) -> tuple[str, int]:
        return self.topology.value, self.chunk.value

    def _make_cluster(self, model: str, options: dict[str, Any]) -> Cluster:
        topology, chunk = self._built = self._settings
        return Cluster(model, topology, modes_of(topology)[-1], max_num_batched_tokens=chunk, **options)

    # ------------------------------------------------------------------------------------------ painting

    def _paint(self) -> None:
        """The painter's thread, which alone draws; until the load has ended."""
        pause = threading.Event()
        while self.driver.running:
            self._redraw()
            pause.wait(PAINT_EVERY)
        self._redraw()
        self.start_button.disabled, self.stop_button.disabled = False, True

    def _redraw(self) -> None:
        picture = self.driver.picture()
        with self.figure.batch_update():
            self._draw(picture)
        self.message.value = self.sentence(picture)

    def sentence(self, picture: Picture) -> str:
        """How it goes, in words; HTML."""
        if self.driver.error is not None:
            return f'<span style="color:#d55e00"><b>{escape(f"{type(self.driver.error).__name__}: {self.driver.error}")}</b></span>'
        if self.driver.running and not self.driver.serving:
            return t("live.starting")
        recent = [seen for seen in picture.requests if seen.finish is not None and seen.finish >= picture.elapsed - SHOWN]
        said = t("live.state", elapsed=f"{picture.elapsed:.0f}", open=picture.num_open, finished=picture.num_finished,
                 ttft=_middle_and_tail([seen.ttft for seen in recent]), tpot=_middle_and_tail([seen.tpot for seen in recent]))
        if not self.driver.running:
            said += t("live.stopped")
        if self._built not in (None, self._settings):
            said += t("live.needs_start")
        if picture.num_turned_away:
            said += t("live.turned_away", n=picture.num_turned_away)
        return said

    def snapshot(self) -> go.Figure:
        """What is shown now as a static figure, with the line of words as its title."""
        figure = go.Figure(self.figure.to_plotly_json())
        title = {"text": self.message.value, "font_size": 13, "x": 0.01, "xanchor": "left", "yref": "container", "y": 0.98}
        return figure.update_layout(margin_t=70, title=title)

    def _draw(self, picture: Picture) -> None:
        begin = max(0.0, picture.elapsed - SHOWN)
        traces = dict(zip(TRACES, self.figure.data, strict=True))
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
        self.figure.update_xaxes(range=[begin, begin + SHOWN])


def modes_of(topology: str) -> list[str]:
    """Those that its workers can serve."""
    modes = []
    for mode in MODES:
        try:
            Topology.parse(topology).check_mode(mode)
        except ConfigError:
            continue
        modes.append(mode)
    return modes


def topologies_here() -> list[str]:
    """Some that this machine has devices for: with both ways, and with either alone."""
    number = torch.cuda.device_count()
    devices = [str(index) for index in range(number)] or ["cpu"]
    c, p, d = (devices[index % len(devices)] for index in range(3))
    return [f"C:{c} P:{p} D:{d}", f"C:{c}", f"P:{c} D:{p}"]


def _middle_and_tail(seconds: list[float | None]) -> str:
    values = [1e3 * value for value in seconds if value is not None]
    if len(values) < 2:
        return "–"
    return f"{median(values):,.0f} / {quantiles(values, n=10)[-1]:,.0f}"


def _described(seen: Seen) -> str:
    return t("live.decision", request=escape(seen.request_id), tokens=seen.prompt_len, way=t(f"live.{seen.mode}"),
             path=escape(seen.path or "…"))


def _control(kind: type[widgets.Widget], key: str, **values: Any) -> widgets.Widget:
    return kind(description=t(key), style={"description_width": "initial"},
                layout=widgets.Layout(width="auto", flex="1 1 220px", margin="2px 12px 2px 0"), **values)


def _button(key: str, icon: str, css_class: str, method: Any, style: str) -> widgets.Button:
    button = widgets.Button(description=t(key), icon=icon, button_style=style, layout=widgets.Layout(width="auto"))
    button.add_class(css_class)
    button.on_click(lambda _: method())
    return button


def _bare_figure() -> go.Figure:
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
