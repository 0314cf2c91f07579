"""The sweep explorer in a real browser: pull a bound of the SLO, choose another quantile, see the figure change."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

PANEL = """\
from nanopd import widgets
from nanopd.config import SLO
from nanopd.widgets.sweep_explorer import Cell, Felt

cells = [Cell(mode, rate, 2.0, [Felt(0.01 * number, 0.001 * rate)] * rate)
         for number, mode in ((4, "collocated"), (9, "disaggregated")) for rate in (4, 8, 16)]
widgets.SweepExplorer(cells, "simulated", "2 x H200", SLO(0.085, 0.012))"""


@pytest.mark.parametrize(("lang", "badge", "none"), [
    ("en", "Simulated, not measured", "disaggregated none of these"),
    pytest.param("zh", "仿真，非实测", "分离 一个也不行", marks=pytest.mark.nightly)])
def test_the_figure_follows_the_slo(open_notebook, write_notebook, lang, badge, none):
    notebook = open_notebook(write_notebook(f"{lang}/sweep.ipynb", PANEL))
    notebook.run_all()
    panel = notebook.panel("widgets.SweepExplorer(")
    assert badge in panel.text_content() and none in panel.text_content()
    notebook.slide_and_see_change(panel, "End")
    notebook.wait_until(lambda: none not in panel.text_content(), "a looser TTFT serves nobody more")
    notebook.slide_and_see_change(panel, "Home", ".nanopd-tpot-bound")
    notebook.wait_until(lambda: none in panel.text_content(), "a tighter TPOT serves as many")
    _, after = notebook.press_and_see_change(panel, ".widget-toggle-button:first-child")
    assert "p50" in after
    notebook.screenshot(f"07-{lang}")
    notebook.assert_quiet()
