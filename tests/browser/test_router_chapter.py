"""The panels of chapter 06 in a real browser: the live one has drawn decisions, the replay says that it is one, the microscope
follows its list."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.nightly, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("lang", "recorded", "regret"), [("en", "RECORDED on", "Estimated regret"), ("zh", "录制回放", "遗憾值的估计")])
def test_decisions_were_drawn_and_one_is_looked_at(open_notebook, lang, recorded, regret):
    notebook = open_notebook(f"solutions/{lang}/06_router.ipynb")
    notebook.run_all()
    live = notebook.panel("widgets.LiveServing(")
    assert live.evaluate("panel => panel.querySelector('.js-plotly-plot').data.slice(0, 2).some(trace => trace.x.length)")
    notebook.screenshot(f"06-live-{lang}")
    replay = notebook.panel("widgets.LiveReplay(")
    assert recorded in notebook.figure_of(replay)
    notebook.screenshot(f"06-replay-{lang}")
    microscope = notebook.panel("widgets.RoutingMicroscope(")
    before = notebook.figure_of(microscope)
    microscope.wait_for_selector(".nanopd-pick select").select_option(index=2)
    notebook.wait_until(lambda: notebook.figure_of(microscope) != before, "the microscope does not follow its list")
    assert regret in microscope.text_content()
    notebook.screenshot(f"06-microscope-{lang}")
    notebook.assert_quiet()
