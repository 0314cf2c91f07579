"""The explorers of chapters 03 and 04 in a real browser: move a slider, press a button, see the figure change."""

from __future__ import annotations

import pytest
from browser.solved import assert_solved

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

COST_MODEL = """\
from nanopd import widgets
from nanopd.cost_model.presets import preset

widgets.CostModelExplorer(preset("nvidia-h200/qwen3-8b"))"""


@pytest.mark.parametrize(("lang", "word"), [
    pytest.param("en", "thread blocks on", marks=pytest.mark.nightly), ("zh", "个线程块")])
def test_the_kernel_explorer_follows_its_sliders(open_notebook, lang, word):
    notebook = open_notebook(f"solutions/{lang}/03_cuda_kernel.ipynb")
    notebook.run_all()
    assert_solved(notebook)
    panel = notebook.panel("times.explorer(")
    assert word in panel.text_content()
    notebook.slide_and_see_change(panel)
    notebook.press_and_see_change(panel, ".widget-toggle-button:first-child")
    notebook.screenshot(f"03-{lang}")
    notebook.assert_quiet()


@pytest.mark.parametrize(("lang", "badge", "path"), [
    ("en", "Measured on NVIDIA H200", "disaggregated"),
    pytest.param("zh", "实测 NVIDIA H200", "分离", marks=pytest.mark.nightly)])
def test_the_cost_model_explorer_follows_its_sliders(open_notebook, write_notebook, lang, badge, path):
    notebook = open_notebook(write_notebook(f"{lang}/cost_model_explorer.ipynb", COST_MODEL))
    notebook.run_all()
    panel = notebook.panel("widgets.CostModelExplorer(")
    assert badge in panel.text_content()
    notebook.slide_and_see_change(panel)
    _, after = notebook.press_and_see_change(panel, ".widget-toggle-button:last-child")
    assert '"32,768"' in after and f'"{path}"' in after, "the map and the bars keep their names"
    notebook.screenshot(f"04-{lang}")
    notebook.assert_quiet()
