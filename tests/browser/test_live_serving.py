"""The live panel in a real browser: the page stays alive while a CPU serves, and the kernel does too."""

from __future__ import annotations

import time

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

PANEL = """\
from nanopd import widgets
from nanopd.widgets.live_load import Load

live = widgets.LiveServing(topologies=["C:cpu P:cpu D:cpu"], dtype="float32",
                           load=Load(rate=0, mix="short", output_tokens=4, mode="collocated"))
live"""
ASK = 'print("load", live.driver.load.rate, "running", live.driver.running)'
NUM_DECISIONS = "panel => panel.querySelector('.js-plotly-plot').data.slice(0, 2).reduce((sum, trace) => sum + trace.x.length, 0)"
RATE = ".noUi-handle"  # the first slider


def decisions(panel) -> int:
    return panel.evaluate(NUM_DECISIONS)


def start(open_notebook, write_notebook, lang: str):
    """A notebook whose panel serves, with nothing to do yet."""
    notebook = open_notebook(write_notebook(f"{lang}/live.ipynb", PANEL, ASK))
    notebook.run_all()
    notebook.panel("widgets.LiveServing(").wait_for_selector(".nanopd-start").click()
    notebook.wait_until(lambda: "running True" in notebook.run_cell("live.driver.load"), "it does not run")
    return notebook, notebook.panel("widgets.LiveServing(")


def seconds_to_a_decision(notebook, panel) -> float:
    """With nothing to do: from the moment that the rate is moved up, until the page shows a decision."""
    notebook.page.wait_for_timeout(1500)
    before = decisions(panel)
    panel.wait_for_selector(RATE).press("End")
    pressed = time.monotonic()
    while decisions(panel) == before:
        assert time.monotonic() < pressed + 60, "no decision appeared"
        notebook.page.wait_for_timeout(20)
    elapsed = time.monotonic() - pressed
    panel.wait_for_selector(RATE).press("Home")
    return elapsed


@pytest.mark.nightly  # on a machine that does nothing else
def test_a_decision_appears_within_a_second(open_notebook, write_notebook):
    notebook, panel = start(open_notebook, write_notebook, "en")
    assert any(seconds_to_a_decision(notebook, panel) < 1 for _ in range(3)), "decisions are more than a second late"


@pytest.mark.parametrize("lang", ["en", pytest.param("zh", marks=pytest.mark.nightly)])
def test_it_serves_while_page_and_kernel_stay_alive(open_notebook, write_notebook, lang):
    notebook, panel = start(open_notebook, write_notebook, lang)
    panel.wait_for_selector(RATE).press("End")
    notebook.wait_until(lambda: decisions(panel) >= 5, "no decisions appeared")
    notebook.wait_until(lambda: "load 20.0" in notebook.run_cell("live.driver.load"), "the slider does not reach the kernel")
    said = notebook.run_cell("live.driver.load")
    assert "running True" in said, f"it has stopped, though the kernel answers: {said}"
    panel = notebook.panel("widgets.LiveServing(")
    notebook.screenshot(f"live-{lang}")
    panel.wait_for_selector(".nanopd-stop").click()
    notebook.wait_until(lambda: "running False" in notebook.run_cell("live.driver.load"), "Stop does not stop")
    notebook.page.wait_for_timeout(1500)  # the page may have a few frames to catch up with
    after = decisions(panel)
    notebook.page.wait_for_timeout(1500)
    assert decisions(panel) == after
    notebook.assert_quiet()
