"""Live serving, replayed: what a recorded run showed, at its own pace or five times as fast.

Time is told by the page, so that the kernel stays free and nothing runs when nobody looks. Nothing here was measured as it is
shown: the panel says so above the figure, in it, and by its colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go

from nanopd.widgets.figure import Panel
from nanopd.widgets.live_figure import SHOWN, bare_figure, draw, state_of, still
from nanopd.widgets.live_recording import Recording, recordings
from nanopd.widgets.strings import t

TICK = 0.4  # seconds of the recording
SPEEDS = {"1x": (1, 400), "5x": (2, 160)}  # so many ticks at a time, so many milliseconds apart
AMBER, CREAM = "#8a5a00", "#fff7e0"  # of what is recorded: no live panel has them


class LiveReplay(Panel):
    """Recorded runs to choose from, a button that plays, a slider that goes to any moment, and the figure of `LiveServing`.

    Args:
        device: whose runs, a name or a part of one; where none was recorded there, the panel says so, and has those that there
            are. Default: all, GPUs first.
        runs: instead of those that come with the package.
    """

    def __init__(self, device: str | None = None, runs: Sequence[Recording] | None = None) -> None:
        everything = recordings() if runs is None else list(runs)
        fitting = everything if device is None or runs is not None else recordings(device)
        self.runs = fitting or everything
        self.notice = "" if fitting else _nothing_on(device, everything)
        self._make_controls()
        self.badge, self.message = widgets.HTML(), widgets.HTML(self.notice)
        super().__init__(_marked_figure(), above=[self._row(), self.badge, self.message] if self.runs else [self.message])
        self.add_class("nanopd-live-replay")
        if self.runs:
            self._take_up()

    @property
    def recording(self) -> Recording:
        """The one that is shown."""
        return self.choice.value

    @property
    def now(self) -> float:
        """Seconds since the start of the recording."""
        return min(self.slider.value * TICK, self.recording.seconds)

    def show(self, seconds: float) -> None:
        """Go to a moment, or to the end where that is earlier."""
        self._go_to(min(math.ceil(seconds / TICK), self.slider.max))

    def sentences(self) -> list[str]:
        """How things stood, and under which load; HTML."""
        load = self.recording.load_at(self.now)
        mode = t(f"live.{load.mode}") if load.mode else "–"
        over = t("replay.over") if self.now >= self.recording.seconds else ""
        then = t("replay.load", rate=f"{load.rate:g}", mix=t(f"live.{load.mix}"), output=load.output_tokens, mode=mode)
        return [*([self.notice] if self.notice else []), then, state_of(self.recording.picture(self.now)) + over]

    def snapshot(self) -> go.Figure:
        """What is shown now as a static figure, with the words above it."""
        return still(self.figure, [f"<b>{self._source()}</b>", *self.sentences()] if self.runs else [self.notice])

    # Controls

    def _make_controls(self) -> None:
        names = [_name(run) for run in self.runs]
        self.choice = widgets.Dropdown(description=t("replay.recording"), options=list(zip(names, self.runs)),
                                       style={"description_width": "initial"}, layout=widgets.Layout(flex="1 1 260px"))
        self.play = widgets.Play(show_repeat=False)
        self.speed = widgets.ToggleButtons(options=list(SPEEDS), style={"button_width": "auto"}, tooltips=[t("replay.speed")] * 2)
        self.slider = widgets.IntSlider(readout=False, layout=widgets.Layout(width="auto", flex="1 1 200px", margin="0 12px"))
        self._link = widgets.jslink((self.play, "value"), (self.slider, "value"))
        self.choice.observe(lambda _: self._take_up(), names="value")
        self.speed.observe(lambda _: self._set_speed(), names="value")
        self.slider.observe(lambda _: self._redraw(), names="value")
        self._set_speed()

    def _row(self) -> widgets.HBox:
        return widgets.HBox([self.choice, self.play, self.speed, self.slider],
                            layout=widgets.Layout(flex_flow="row wrap", align_items="center"))

    def _set_speed(self) -> None:
        """The slider stops where the player does, so that from wherever it is put there are whole steps to the end."""
        self.play.step, self.play.interval = SPEEDS[self.speed.value]
        self.slider.step = self.play.step
        self._go_to(self.slider.value - self.slider.value % self.slider.step)

    def _go_to(self, tick: int) -> None:
        self.play.value = self.slider.value = tick

    def _take_up(self) -> None:
        """Another recording: as it ended, to begin with."""
        self.play.playing = False
        self.badge.value = (f'<div style="background:{CREAM};color:{AMBER};border:2px solid {AMBER};border-radius:4px;padding:2px 10px;'
                            f'font-weight:600">{self._source()}</div>')
        last = math.ceil(self.recording.seconds / TICK)
        self.play.max = self.slider.max = last + last % 2  # whole steps at both speeds
        self.show(self.recording.seconds)
        self._redraw()

    def _source(self) -> str:
        run = self.recording
        return t("replay.badge", source=escape(run.source), model=escape(run.model), topology=escape(run.topology))

    # Drawing

    def _redraw(self) -> None:
        with self.figure.batch_update():
            draw(self.figure, self.recording.picture(self.now), min(SHOWN, self.recording.seconds))
            self.figure.layout.annotations[-1].text = f"<b>{t('replay.mark', source=escape(self.recording.source))}</b>"
        self.message.value = "<br>".join(self.sentences())


def _marked_figure() -> go.Figure:
    """With a mark within it, for wherever the figure is taken."""
    figure = bare_figure().update_layout(paper_bgcolor=CREAM)
    return figure.add_annotation(text="", showarrow=False, font={"size": 12, "color": AMBER}, xref="paper", yref="paper",
                                 x=0, y=1.05, xanchor="left", yanchor="bottom")


def _name(run: Recording) -> str:
    modes = " + ".join(t(f"live.{mode}") if mode else "–" for mode in run.modes)
    return t("replay.choice", device=run.device["name"], date=run.date[:10], mode=modes)


def _nothing_on(device: str | None, everything: Sequence[Recording]) -> str:
    if not everything:
        return t("replay.none")
    there = ", ".join(dict.fromkeys(escape(run.device["name"]) for run in everything))
    return t("replay.none_of", device=escape(device), there=there)
