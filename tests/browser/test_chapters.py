"""Chapters in a real browser: JupyterLab in headless Chromium, run all cells, press Step, see the picture change."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

PANEL = """\
import ipywidgets, plotly.graph_objects as go
from IPython.display import display
from nanopd.widgets.figure import Panel
from nanopd.widgets.strings import t

step, slider = ipywidgets.Button(description="Step"), ipywidgets.IntSlider(value=3, max=9)
step.add_class("nanopd-step")
own = Panel(go.Figure(go.Bar(y=[1, 2, 3]), layout={"title": {"text": t("predict.title", id="01.4")}}), [step, slider])
def grow(_=None):
    with own.figure.batch_update():
        own.figure.data[0].y = [value + 1 for value in own.figure.data[0].y]
step.on_click(grow)
slider.observe(grow, "value")
display(own)
for _ in range(100):  # while the page is still fetching what it draws with, and while it draws
    grow()"""
BLOCK_MAP = """\
from nanopd import widgets
from nanopd.block_manager import BlockSpaceManager
from nanopd.core import Sequence

manager, parent = BlockSpaceManager(num_blocks=32, block_size=4), Sequence(range(10))
manager.allocate(parent)
parent.num_computed = 10
child = manager.fork(parent)
manager.append_slot(child)
widgets.BlockMap(manager, watch=[parent, child])"""
FREE_WIDTH = """panel => {
    const [plot, line] = ['.main-svg', '.nanopd-panel'].map(name => panel.querySelector(name).getBoundingClientRect());
    return line.width - plot.width;
}"""


def test_the_harness_sees_a_panel_change(open_notebook, write_notebook):
    notebook = open_notebook(write_notebook("zh/harness.ipynb", "1 + 1", PANEL))
    notebook.run_all()
    panel = notebook.panel("Panel(")
    notebook.wait_until(lambda: "[101,102,103]" in notebook.figure_of(panel), "the last of many changes is not shown")
    before, after = notebook.press_and_see_change(panel)
    assert "预测 01.4" in before, "the kernel speaks its folder's language"
    assert before != after
    notebook.slide_and_see_change(panel)
    assert notebook.screenshot("harness-zh").stat().st_size > 10_000
    notebook.assert_quiet()


def test_the_harness_hears_errors_and_foreign_requests(open_notebook, write_notebook):
    script = "console.error('spoken up'); fetch('http://nanopd.invalid/').catch(() => {})"
    cell = f'from IPython.display import HTML\nHTML("<script>{script}</script>")'
    notebook = open_notebook(write_notebook("en/loud.ipynb", cell))
    notebook.run_all()
    notebook.page.wait_for_timeout(500)
    assert notebook.foreign_requests == ["http://nanopd.invalid/"]
    assert any("spoken up" in error for error in notebook.console_errors)
    with pytest.raises(AssertionError):
        notebook.assert_quiet()


def test_the_harness_fails_with_the_error_of_a_cell(open_notebook, write_notebook):
    notebook = open_notebook(write_notebook("en/broken.ipynb", "1 / 0", "2"))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        notebook.run_all()


def test_a_panel_fills_its_cell_whatever_its_width(open_notebook, write_notebook):
    """Also one that was first drawn out of sight."""
    notebook = open_notebook(write_notebook("en/block_map.ipynb", BLOCK_MAP, "print('a line\\n' * 200)"))
    notebook.run_all()
    panel = notebook.panel("widgets.BlockMap")
    for width in (1280, 900, 1280):
        notebook.page.set_viewport_size({"width": width, "height": 900})
        notebook.wait_until(lambda: abs(panel.evaluate(FREE_WIDTH)) < 16, f"the figure does not fill a page of {width}")
    notebook.press_and_see_change(panel)
    notebook.slide_and_see_change(panel)
    notebook.assert_quiet()


@pytest.mark.parametrize(("lang", "word"), [
    ("en", "Block pool"), pytest.param("zh", "块池", marks=pytest.mark.nightly)])
def test_the_block_map_of_chapter_01_steps(open_notebook, lang, word):
    notebook = open_notebook(f"solutions/{lang}/01_block_manager.ipynb")
    notebook.run_all()
    panel = notebook.panel("widgets.BlockMap(small")  # the one with a live manager behind it, after the whole chapter
    before, _ = notebook.press_and_see_change(panel)
    assert word in before
    notebook.press_and_see_change(panel)
    notebook.slide_and_see_change(panel, "ArrowLeft")
    notebook.screenshot(f"01-{lang}")
    notebook.assert_quiet()


@pytest.mark.parametrize(("lang", "chapter", "code"), [
    ("en", "00_start_here", "widgets.BatchTimeline({"),
    pytest.param("zh", "02_engine", "widgets.BatchTimeline(llm", marks=pytest.mark.nightly)])
def test_a_batch_timeline_goes_back(open_notebook, lang, chapter, code):
    notebook = open_notebook(f"solutions/{lang}/{chapter}.ipynb")
    notebook.run_all()
    notebook.press_and_see_change(notebook.panel(code), ".nanopd-back")
    notebook.screenshot(f"{chapter}-{lang}")
    notebook.assert_quiet()
