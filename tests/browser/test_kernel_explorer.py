"""The kernel explorer of chapter 03 in a real browser: move a slider, press a kernel, see the figure change."""

from __future__ import annotations

import pytest
from browser.solved import assert_solved

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("lang", "word"), [
    pytest.param("en", "thread blocks on", marks=pytest.mark.nightly), ("zh", "个线程块")])
def test_the_explorer_follows_its_sliders(open_notebook, lang, word):
    notebook = open_notebook(f"solutions/{lang}/03_cuda_kernel.ipynb")
    notebook.run_all()
    assert_solved(notebook)
    panel = notebook.panel("times.explorer(")
    assert word in panel.text_content()
    notebook.slide_and_see_change(panel)
    notebook.press_and_see_change(panel, ".widget-toggle-button:first-child")
    notebook.screenshot(f"03-{lang}")
    notebook.assert_quiet()
