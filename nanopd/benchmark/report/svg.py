"""A plotly figure as SVG, without a browser: of plotly what our figures use."""

from __future__ import annotations

import plotly.graph_objects as go


def to_svg(figure: go.Figure) -> str:
    """The figure as it stands, as a white card, 960 pixels wide unless its layout says otherwise."""
    raise NotImplementedError
