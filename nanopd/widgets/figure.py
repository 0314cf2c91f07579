"""A panel's figure in the page.

Plotly's own widget sends each change of a figure as a message of its own, and loses those that arrive while the page is still
drawing; and it brings its own copy of plotly.js, 5 MB, with every figure. Here the page is told what the whole figure is, draws
the latest it knows of, and gets plotly.js once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import anywidget
import ipywidgets as widgets
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from traitlets import Instance, Unicode


class LiveFigure(go.Figure):
    """A figure that is looked at while it changes: what `with figure.batch_update():` encloses is seen when it ends, and all at
    once. Other changes are seen with the next such block."""

    def __init__(self, figure: go.Figure) -> None:
        super().__init__(figure)
        self._when_changed: Callable[[], None] | None = None

    def when_changed(self, tell: Callable[[], None]) -> None:
        """From now on, `tell` is called after each `batch_update`."""
        self._when_changed = tell

    @contextmanager
    def batch_update(self) -> Iterator[None]:
        with super().batch_update():
            yield
        if self._when_changed is not None:
            self._when_changed()


class PlotlyLibrary(widgets.Widget):
    """plotly.js for the page. One for all views of a kernel."""

    source = Unicode().tag(sync=True)


@cache
def _library() -> PlotlyLibrary:
    return PlotlyLibrary(source=get_plotlyjs())


class FigureView(anywidget.AnyWidget):
    """A `LiveFigure` in the page: as it is after its latest change, and as wide as its cell, whatever happens to the cell."""

    _esm = """
    async function evaluate(model) {
      const name = model.get("_library").slice("IPY_MODEL_".length);
      const library = await model.widget_manager.get_model(name);
      const module = { exports: {} };  // a module of its own, whatever the page calls `define` or `Plotly`
      new Function("module", "exports", "define", library.get("source"))(module, module.exports);
      return module.exports;
    }

    export default {
      async render({ model, el }) {
        const plot = el.appendChild(document.createElement("div"));
        globalThis.nanopdPlotly ??= evaluate(model).catch((error) => {
          globalThis.nanopdPlotly = undefined;  // the next figure may have more luck
          throw error;
        });
        const Plotly = await globalThis.nanopdPlotly;
        let drawing = false, changed = false, width = 0;

        async function draw() {  // figures that come while one is drawn make one: the latest
          changed = true;
          if (drawing) return;
          drawing = true;
          try {
            while (changed) {
              changed = false;
              const { data, layout } = JSON.parse(model.get("_figure"));
              layout.height ??= 360;
              layout.uirevision ??= "as the reader left it";  // what was zoomed stays so
              await Plotly.react(plot, data, layout, { displayModeBar: false });
            }
          } finally {
            drawing = false;
          }
        }

        function fit() {
          if (!el.clientWidth || el.clientWidth === width) return;  // out of sight, or no news
          width = el.clientWidth;
          Plotly.Plots.resize(plot);
        }

        model.on("change:_figure", draw);
        await draw();
        const observer = new ResizeObserver(fit);
        observer.observe(el);
        plot.on("plotly_click", ({ points }) =>
          model.send({ clicked: points.map(({ curveNumber, pointNumber }) => [curveNumber, pointNumber]) }));
        return () => {
          observer.disconnect();
          model.off("change:_figure", draw);
          Plotly.purge(plot);
        };
      },
    };
    """
    _figure = Unicode().tag(sync=True)
    _library = Instance(PlotlyLibrary).tag(sync=True, **widgets.widget_serialization)

    def __init__(self, figure: LiveFigure) -> None:
        super().__init__(_figure=figure.to_json(validate=False), _library=_library())
        figure.when_changed(lambda: setattr(self, "_figure", figure.to_json(validate=False)))

    def on_click(self, clicked: Callable[[int, int], None]) -> None:
        """`clicked(trace, point)`, by their numbers, for each point of the figure that the reader clicks on."""
        def receive(_: Any, content: dict[str, Any], buffers: Any) -> None:
            for trace, point in content.get("clicked", []):
                clicked(trace, point)

        self.on_msg(receive)


class Panel(widgets.VBox):
    """Controls and a figure, one under the other; `figure` is the one in the page, to be changed in place."""

    def __init__(self, figure: go.Figure, above: list[widgets.Widget] | None = None) -> None:
        self.figure = LiveFigure(figure)
        self.view = FigureView(self.figure)
        super().__init__([*(above or []), self.view])
        self.add_class("nanopd-panel")
