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
ASK = 'print("load", live.driver.load.rate, "finished", len(live.request_ids), "running", live.driver.running)'
NUM_DECISIONS = "panel => panel.querySelector('.js-plotly-plot').data.slice(0, 2).reduce((sum, trace) => sum + trace.x.length, 0)"
RATE = ".noUi-handle"  # the first slider


def decisions(panel) -> int:
    return panel.evaluate(NUM_DECISIONS)


def seconds_to_a_decision(notebook, panel) -> float:
    """From nothing to do until the page shows that a request was sent on its way, once the slider has been moved."""
    notebook.page.keyboard.press("Home")
    notebook.wait_until(lambda: notebook.run_cell("live.driver.load").startswith("load 0"), "the rate did not come down")
    notebook.page.wait_for_timeout(1000)
    before = decisions(panel)
    panel.wait_for_selector(RATE).press("End")
    pressed = time.monotonic()
    notebook.wait_until(lambda: decisions(panel) > before, "no decision appeared")
    panel.wait_for_selector(RATE).press("Home")
    return time.monotonic() - pressed


@pytest.mark.parametrize("lang", ["en", pytest.param("zh", marks=pytest.mark.nightly)])
def test_it_serves_while_page_and_kernel_stay_alive(open_notebook, write_notebook, lang):
    notebook = open_notebook(write_notebook(f"{lang}/live.ipynb", PANEL, ASK))
    notebook.page.evaluate("async () => { await jupyterapp.commands.execute('notebook:run-all-cells'); }")
    panel = notebook.panel("widgets.LiveServing(")
    panel.wait_for_selector(".nanopd-start").click()
    notebook.wait_until(lambda: "running True" in notebook.run_cell("live.driver.load"), "it does not run")
    panel = notebook.panel("widgets.LiveServing(")
    handle = panel.wait_for_selector(RATE)
    handle.press("End")
    notebook.wait_until(lambda: decisions(panel) >= 5, "no decisions appeared")
    said = notebook.run_cell("live.driver.load")
    assert "load 20.0" in said and "running True" in said, f"the kernel answers while it serves, and the slider got there: {said}"
    notebook.screenshot(f"live-{lang}")
    panel = notebook.panel("widgets.LiveServing(")
    panel.wait_for_selector(".nanopd-stop").click()
    notebook.wait_until(lambda: "running False" in notebook.run_cell("live.driver.load"), "Stop does not stop")
    after = decisions(panel)
    notebook.page.wait_for_timeout(1500)
    assert decisions(panel) == after
    notebook.assert_quiet()
