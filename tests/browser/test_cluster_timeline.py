"""The panels of chapter 05 in a real browser: step back through a cluster's timeline, measure the transports."""

from __future__ import annotations

import pytest
from browser.solved import assert_solved

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("lang", "hidden", "measured"), [
    ("en", "hidden behind computation", "measured here"),
    pytest.param("zh", "被计算盖住", "本机实测", marks=pytest.mark.nightly)])
def test_the_timeline_and_the_times_of_transfers_answer(open_notebook, lang, hidden, measured):
    notebook = open_notebook(f"solutions/{lang}/05_workers.ipynb")
    notebook.run_all()
    assert_solved(notebook)
    timeline = notebook.panel("widgets.ClusterTimeline(")
    before, _ = notebook.press_and_see_change(timeline, ".nanopd-back")
    assert hidden in before and "→ D1" in before
    notebook.slide_and_see_change(timeline, "ArrowLeft")
    notebook.screenshot(f"05-{lang}")
    times = notebook.panel("widgets.TransferTimes(")
    notebook.wait_until(lambda: measured in notebook.figure_of(times), "the times of transfers are not drawn")
    notebook.assert_quiet()
