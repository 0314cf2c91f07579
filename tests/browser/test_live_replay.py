"""The replay in a real browser: time passes in the page, five times as fast if wanted, and nobody can take it for live."""

from __future__ import annotations

import time

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.nightly, pytest.mark.timeout(600)]

PANEL = """\
from nanopd import widgets

replay = widgets.LiveReplay()
replay"""
NOW = "print(replay.now)"
PLAY, STOP = ".widget-play button:first-child", ".widget-play button:nth-child(2)"


def now(notebook) -> float:
    return float(notebook.run_cell(NOW))


def pace(notebook, speed: int) -> float:
    """Seconds of the recording that pass in one of ours, at the first or the second speed. What the test itself takes counts as
    ours, so a busy machine has a slower pace, and none a quicker one."""
    panel = notebook.panel("widgets.LiveReplay(")
    panel.wait_for_selector(f".widget-toggle-button:nth-child({speed})").click()
    before = now(notebook)
    panel = notebook.panel("widgets.LiveReplay(")
    play = panel.wait_for_selector(PLAY)
    begin = time.monotonic()
    play.click()
    notebook.page.wait_for_timeout(2500)
    play.click()  # and it pauses
    seconds = time.monotonic() - begin
    notebook.page.wait_for_timeout(500)
    return (now(notebook) - before) / seconds


@pytest.mark.parametrize(("lang", "badge", "mark"), [
    ("en", "Replay, not live", "RECORDED on"), ("zh", "录制回放，不是现场", "录制回放，录自")])
def test_it_plays_at_both_speeds(open_notebook, write_notebook, lang, badge, mark):
    notebook = open_notebook(write_notebook(f"{lang}/replay.ipynb", PANEL, NOW))
    notebook.run_all()
    panel = notebook.panel("widgets.LiveReplay(")
    notebook.wait_until(lambda: mark in notebook.figure_of(panel), "the figure does not say that it is recorded")
    assert badge in panel.text_content()
    notebook.screenshot(f"replay-{lang}")
    end, whole = now(notebook), notebook.figure_of(panel)
    notebook.panel("widgets.LiveReplay(").wait_for_selector(STOP).click()
    notebook.wait_until(lambda: now(notebook) == 0, "it does not go back to the start")
    paces = [pace(notebook, number) for number in (1, 2)]
    assert 0 < paces[0] < 1.3 and 1.5 * paces[0] < paces[1] < 6.5, f"seconds of the recording in a second: {paces}"
    assert 0 < now(notebook) < end
    panel = notebook.panel("widgets.LiveReplay(")
    panel.wait_for_selector(PLAY).click()
    notebook.wait_until(lambda: notebook.figure_of(panel) == whole, "it does not come to its end")
    notebook.assert_quiet()
