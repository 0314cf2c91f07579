"""For the panels' tests: what a panel has drawn is what its page was told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nanopd.widgets.figure import FigureView, LiveFigure


@pytest.fixture(autouse=True)
def pages_show_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A change outside of `batch_update` would not be seen in the page: found here for every panel that a test has made."""
    made: list[tuple[LiveFigure, FigureView]] = []
    make = FigureView.__init__

    def make_and_note(view: FigureView, figure: LiveFigure) -> None:
        make(view, figure)
        made.append((figure, view))

    monkeypatch.setattr(FigureView, "__init__", make_and_note)
    yield
    for figure, view in made:
        assert view._figure == figure.to_json(validate=False), "the figure was changed outside of batch_update"
