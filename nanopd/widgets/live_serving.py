"""Live serving: a cluster under an open-loop load, with its sliders in your hand.

The load is served by `LoadDriver` in a thread; a second thread paints what it has seen a few times a second, so that the
kernel stays free. What is shown was measured here, as it is shown.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
import torch

from nanopd.cluster import Cluster
from nanopd.config import MODES, ConfigError, Topology
from nanopd.core import InvalidRequest
from nanopd.router.explain import Explanation
from nanopd.widgets.figure import Panel
from nanopd.widgets.live_figure import bare_figure, draw, state_of, still
from nanopd.widgets.live_load import MIXES, Load, LoadDriver, Picture
from nanopd.widgets.strings import t

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
        super().__init__(bare_figure(), above=[*self._rows(), self.message])
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

    def explanations(self) -> list[Explanation]:
        """Of the requests that have ended, of those that the router was asked about; for the routing microscope."""
        asked = [seen.request_id for seen in self.driver.picture().requests if seen.finish is not None and seen.error is None]
        return self.driver.call(lambda cluster: [*_explained(cluster, asked)])

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
            draw(self.figure, picture)
        self.message.value = self.sentence(picture)

    def sentence(self, picture: Picture) -> str:
        """How it goes, in words; HTML."""
        if self.driver.error is not None:
            return f'<span style="color:#d55e00"><b>{escape(f"{type(self.driver.error).__name__}: {self.driver.error}")}</b></span>'
        if self.driver.running and not self.driver.serving:
            return t("live.starting")
        said = state_of(picture)
        if not self.driver.running:
            said += t("live.stopped")
        if self._built not in (None, self._settings):
            said += t("live.needs_start")
        return said

    def snapshot(self) -> go.Figure:
        """What is shown now as a static figure, with the line of words as its title."""
        return still(self.figure, [self.message.value])


def _explained(cluster: Cluster, request_ids: list[str]) -> Iterator[Explanation]:
    for request_id in request_ids:
        with suppress(InvalidRequest):  # it named its way itself
            yield cluster.explain(request_id)


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


def _control(kind: type[widgets.Widget], key: str, **values: Any) -> widgets.Widget:
    return kind(description=t(key), style={"description_width": "initial"},
                layout=widgets.Layout(width="auto", flex="1 1 220px", margin="2px 12px 2px 0"), **values)


def _button(key: str, icon: str, css_class: str, method: Any, style: str) -> widgets.Button:
    button = widgets.Button(description=t(key), icon=icon, button_style=style, layout=widgets.Layout(width="auto"))
    button.add_class(css_class)
    button.on_click(lambda _: method())
    return button
