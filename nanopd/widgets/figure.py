"""A panel's figure in the page: as wide as its cell, also after the cell has become wider or narrower.

Plotly's widget alone keeps the width it was first drawn with, which is 700 pixels for a cell that is out of sight.
"""

from __future__ import annotations

import anywidget
import ipywidgets as widgets
import plotly.graph_objects as go


class Fit(anywidget.AnyWidget):
    """An empty line of the panel. Whenever its width changes, the panel's figures are told to take theirs anew."""

    _esm = """
    export default { render({ el }) {
      let drawn = 0;
      const observer = new ResizeObserver(() => {
        const width = el.clientWidth;
        if (!width || width === drawn) return;  // out of sight, or no news
        drawn = width;
        for (const plot of el.closest(".nanopd-panel")?.querySelectorAll(".js-plotly-plot") ?? [])
          plot._responsiveChartHandler?.();  // what plotly does when the window is resized
      });
      observer.observe(el);
      return () => observer.disconnect();
    } };
    """


class Panel(widgets.VBox):
    """Controls and a figure, one under the other; `figure` is the one in the page, to be changed in place."""

    def __init__(self, figure: go.Figure, above: list[widgets.Widget] | None = None) -> None:
        self.figure = go.FigureWidget(figure)
        self.figure._config = {"responsive": True, "displayModeBar": False}
        super().__init__([*(above or []), self.figure, Fit()])
        self.add_class("nanopd-panel")
