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


def pull(notebook, panel, bound: str, key: str, there: str) -> None:
    """Move a bound to one end, and see the figure change. What comes while plotly draws for the first time is lost to the page,
    so it is pulled again, by way of the other end."""
    before, handle = notebook.figure_of(panel), panel.wait_for_selector(f".nanopd-{bound}-bound .noUi-handle")

    def redrawn() -> bool:
        handle.press(there)
        handle.press(key)
        notebook.page.wait_for_timeout(1000)
        return notebook.figure_of(panel) != before

    notebook.wait_until(redrawn, f"the figure does not follow the bound of {bound}")


@pytest.mark.parametrize(("lang", "badge", "none"), [
    ("en", "Simulated, not measured", "disaggregated none of these"),
    pytest.param("zh", "仿真，非实测", "分离 一个也不行", marks=pytest.mark.nightly)])
def test_the_figure_follows_the_slo(open_notebook, write_notebook, lang, badge, none):
    notebook = open_notebook(write_notebook(f"{lang}/sweep.ipynb", PANEL))
    notebook.run_all()
    panel = notebook.panel("widgets.SweepExplorer(")
    assert badge in panel.text_content() and none in panel.text_content()
    pull(notebook, panel, "ttft", "End", "Home")
    notebook.wait_until(lambda: none not in panel.text_content(), "a looser TTFT serves nobody more")
    pull(notebook, panel, "tpot", "Home", "End")
    notebook.wait_until(lambda: none in panel.text_content(), "a tighter TPOT serves as many")
    _, after = notebook.press_and_see_change(panel, ".widget-toggle-button:first-child")
    assert "p50" in after
    notebook.screenshot(f"07-{lang}")
    notebook.assert_quiet()
