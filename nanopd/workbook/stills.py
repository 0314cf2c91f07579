"""Panels as static figures, for pages without a kernel: the half of the gallery that works inside of the kernel.

A panel may be shown before there is anything in it: chapter 06 starts its load in the cell after. So each leaves its place
in the page, and its figure is taken once all cells have run, as JupyterLab would show it then.
"""

from __future__ import annotations

import json

from IPython import get_ipython
from IPython.display import display

from nanopd.widgets.figure import Panel
from nanopd.widgets.player import Player

PLACE = "application/vnd.nanopd.panel"  # holds a panel's id
STILLS = "application/vnd.nanopd.stills+json"  # id -> plotly's JSON
PLOTLY = "application/vnd.plotly.v1+json"


class Stills:
    """From now on notes the panels that cells show, instead of showing them."""

    def __init__(self) -> None:
        self._panels: dict[str, Panel] = {}
        get_ipython().display_formatter.mimebundle_formatter.for_type(Panel, self._note)

    def publish(self) -> None:
        """Hand out the figures of all of them, as they are now."""
        display({STILLS: {name: json.loads(_played(panel).snapshot().to_json()) for name, panel in self._panels.items()}}, raw=True)

    def _note(self, panel: Panel) -> dict[str, str]:
        self._panels[panel.model_id] = panel
        return {PLACE: panel.model_id}


def _played(panel: Panel) -> Panel:
    """What is played step by step begins with nothing to see: as it is after the last press of Step."""
    if isinstance(panel, Player):
        panel.to_end()
        while not panel.step_button.disabled:
            panel.step()
    return panel
