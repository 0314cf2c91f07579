"""A page of the gallery in Chromium, opened as a file: its figures are drawn, and it wants nothing from another machine."""

from __future__ import annotations

import pytest
from small_chapter import build_small_chapter

from nanopd.workbook import gallery

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

# Of each figure: how wide it is, beside the page's text, and how many marks are drawn in it.
FIGURES = """() => [...document.querySelectorAll('.js-plotly-plot')].map(plot => [
    plot.querySelector('.main-svg').getBoundingClientRect().width / document.querySelector('main').clientWidth,
    plot.querySelectorAll('.points path, .heatmaplayer image').length])"""


def test_a_page_draws_its_figures_and_asks_nobody(browser, tmp_path):
    build_small_chapter(tmp_path / "book")
    assert gallery.make(tmp_path / "site", languages=("en",), notebooks=tmp_path / "book") == []
    requests, complaints = [], []
    page = browser.new_page()
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "site" / "index.html").as_uri())
    page.get_by_role("link", name="99 A small chapter").click()
    page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot:has(.main-svg)').length >= 3")
    figures = page.evaluate(FIGURES)
    page.close()
    assert len(figures) == 3
    assert all(0.95 < width < 1.02 and marks for width, marks in figures), figures
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert complaints == []
