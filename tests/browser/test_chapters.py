"""Chapters in a real browser: JupyterLab in headless Chromium, run all cells, press Step, see the picture change."""

from __future__ import annotations

import pytest

from nanopd.workbook import builder

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

CHAPTERS = [path.stem for path in builder.sources(builder.NOTEBOOKS, [])]

PANEL = """\
import ipywidgets, plotly.graph_objects as go
from nanopd.widgets.strings import t

figure = go.FigureWidget(go.Bar(y=[1, 2, 3]), layout={"title": {"text": t("predict.title", id="01.4")}})
step = ipywidgets.Button(description="Step")
step.add_class("nanopd-step")
slider = ipywidgets.IntSlider(value=3, max=9)
def grow(_):
    figure.data[0].y = [value + 1 for value in figure.data[0].y]
step.on_click(grow)
slider.observe(grow, "value")
ipywidgets.VBox([figure, step, slider])"""
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


@pytest.mark.parametrize(("lang", "word"), [("en", "Prediction 01.4"), ("zh", "预测 01.4")])
def test_the_harness_sees_a_panel_change(open_notebook, write_notebook, lang, word):
    notebook = open_notebook(write_notebook(f"{lang}/harness.ipynb", "1 + 1", PANEL))
    notebook.run_all()
    before, after = notebook.press_and_see_change()
    assert word in before, "the kernel speaks its folder's language"
    assert before != after
    notebook.slide_and_see_change()
    assert notebook.screenshot(f"harness-{lang}").stat().st_size > 10_000
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


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_block_map_steps(open_notebook, write_notebook, lang):
    notebook = open_notebook(write_notebook(f"{lang}/block_map.ipynb", BLOCK_MAP))
    notebook.run_all()
    notebook.press_and_see_change(".nanopd-step")
    notebook.press_and_see_change(".nanopd-step")
    notebook.slide_and_see_change(".nanopd-block-map .noUi-handle")
    notebook.screenshot(f"block-map-{lang}")
    notebook.assert_quiet()


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("chapter", [stem for stem in CHAPTERS if stem[:2] in ("00", "01", "02")])
def test_a_chapter_runs_and_is_quiet(open_notebook, chapter, lang):
    notebook = open_notebook(f"solutions/{lang}/{chapter}.ipynb")
    notebook.run_all()
    notebook.screenshot(f"{chapter}-{lang}")
    notebook.assert_quiet()


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("chapter", [stem for stem in CHAPTERS if stem.startswith("01_")])
def test_the_block_map_of_the_chapter_steps(open_notebook, chapter, lang):
    notebook = open_notebook(f"solutions/{lang}/{chapter}.ipynb")
    notebook.run_all()
    notebook.press_and_see_change(".nanopd-step")
    notebook.screenshot(f"{chapter}-{lang}-stepped")
    notebook.assert_quiet()
