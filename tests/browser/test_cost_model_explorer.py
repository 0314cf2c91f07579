"""The cost-model explorer in a real browser: move a slider, choose another model, see the figure change."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

PANEL = """\
from nanopd import widgets
from nanopd.cost_model.presets import preset

widgets.CostModelExplorer(preset("nvidia-h200/qwen3-8b"))"""


@pytest.mark.parametrize(("lang", "badge", "path"), [
    ("en", "Measured on NVIDIA H200", "disaggregated"),
    pytest.param("zh", "实测 NVIDIA H200", "分离", marks=pytest.mark.nightly)])
def test_the_explorer_follows_its_sliders(open_notebook, write_notebook, lang, badge, path):
    notebook = open_notebook(write_notebook(f"{lang}/cost_model_explorer.ipynb", PANEL))
    notebook.run_all()
    panel = notebook.panel("widgets.CostModelExplorer(")
    assert badge in panel.text_content()
    notebook.slide_and_see_change(panel)
    _, after = notebook.press_and_see_change(panel, ".widget-toggle-button:last-child")
    assert '"32,768"' in after and f'"{path}"' in after, "the map and the bars keep their names"
    notebook.screenshot(f"04-{lang}")
    notebook.assert_quiet()
