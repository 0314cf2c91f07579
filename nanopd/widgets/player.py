"""The frame of a panel that is played step by step: buttons, a slider, a line of words, and the figure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go

from nanopd.widgets.figure import Panel
from nanopd.widgets.strings import t

FONT = "system-ui, 'Segoe UI', 'Noto Sans', 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif"
INK, FAINT, PAPER = "#1f2937", "#6b7280", "#ffffff"  # a white card is legible in a dark page too


class Player(Panel):
    """A figure that is played step by step: Back, Step, To the end, a slider, and a line of words.

    Every button is a method of the same name. What a callback raises is shown in the line, and raised.
    """

    def __init__(self, figure: go.Figure, css_class: str,
                 extra: SequenceABC[widgets.Widget] = ()) -> None:
        self.message = widgets.HTML()
        self.slider = widgets.IntSlider(min=0, max=0, readout=False,
                                        layout=widgets.Layout(width="auto", flex="1 1 200px", margin="0 16px 0 8px"))
        self.back_button = self._button("player.back", "arrow-left", "nanopd-back", self.back)
        self.step_button = self._button("player.step", "arrow-right", "nanopd-step", self.step)
        self.end_button = self._button("player.to_end", "fast-forward", "nanopd-end", self.to_end)
        self.step_button.button_style = "primary"
        self.slider.observe(self._reporting(self._redraw), names="value")
        controls = widgets.HBox(
            [self.back_button, self.step_button, self.end_button, self.slider, *extra],
            layout=widgets.Layout(flex_flow="row wrap", align_items="center"))
        super().__init__(figure, above=[controls, self.message])
        self.add_class(css_class)

    @property
    def position(self) -> int:
        """How many steps have been played."""
        return self.slider.value

    def step(self) -> None:
        self.go_to(self.position + 1)

    def back(self) -> None:
        self.go_to(self.position - 1)

    def to_end(self) -> None:
        self.go_to(self.slider.max)

    def go_to(self, position: int) -> None:
        """Show the state after `position` steps, or the nearest there is."""
        self.slider.value = max(0, min(position, self.slider.max))

    def snapshot(self) -> go.Figure:
        """What is shown now as a static figure, with the line of text as its title."""
        figure = go.Figure(self.figure.to_plotly_json())
        figure.update_layout(title={"text": self.sentence, "font_size": 13, "x": 0.01, "xanchor": "left",
                                    "yref": "container", "y": 0.99, "yanchor": "top"})
        lines = 1 + self.sentence.count("<br>")
        return figure.update_layout(margin_t=self.figure.layout.margin.t + 18 * lines)

    @property
    @abstractmethod
    def sentence(self) -> str:
        """What the current position shows, in words; HTML."""

    @abstractmethod
    def _draw(self) -> None:
        """Bring the figure up to the current position, in place."""

    def _redraw(self) -> None:
        with self.figure.batch_update():
            self._draw()
        self.message.value = self.sentence
        self.back_button.disabled = self.position == 0
        self.step_button.disabled = self.end_button.disabled = self.position == self.slider.max

    def _set_length(self, num_steps: int, position: int) -> None:
        """The slider for `num_steps` steps, at `position`, drawn anew even if that is where it was."""
        self.slider.max = num_steps
        drawn = self.position
        self.go_to(position)
        if self.position == drawn:
            self._redraw()

    def _button(self, key: str, icon: str, css_class: str, method: Callable[[], None]) -> widgets.Button:
        button = widgets.Button(description=t(key), icon=icon, layout=widgets.Layout(width="auto"))
        button.add_class(css_class)
        button.on_click(self._reporting(method))
        return button

    def _reporting(self, method: Callable[[], None]) -> Callable[[object], None]:
        """In a page, ipywidgets logs what a callback raises where hardly anybody looks: show it here too."""
        def callback(_: object) -> None:
            try:
                method()
            except Exception as error:
                text = escape(f"{type(error).__name__}: {error}")
                self.message.value = f'<span style="color:#d55e00"><b>{text}</b></span>'
                raise
        return callback
