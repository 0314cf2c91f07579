"""The report: a page of all figures that the data allow, and each of them as SVG."""

from __future__ import annotations

from pathlib import Path


def write_report(out: Path, folder: Path) -> Path:
    """Write OUT/index.html, its plotly.min.js and OUT/<figure>.svg of what was recorded in `folder`. Returns the page."""
    raise NotImplementedError
