"""The report in a browser: figures drawn by the script beside it, no other machine asked, pictures that are the same everywhere."""

from __future__ import annotations

import pytest

from nanopd.benchmark.report import write_report
from nanopd.benchmark.results import RECORDED

pytestmark = [pytest.mark.browser]


def test_it_opens_without_a_network(browser, tmp_path):
    written = write_report(tmp_path, RECORDED)
    page, asked, errors = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(written.page.as_uri())
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
    assert page.locator(".js-plotly-plot").count() == len(written.drawn) >= 6
    assert sorted({url for url in asked if not url.startswith("data:")}) == sorted(
        [written.page.as_uri(), (tmp_path / "plotly.min.js").as_uri()])
    assert errors == []
    steps = page.evaluate("[...document.getElementById('plot-decode-scaling').data[0].y]")
    assert len(steps) >= 4 and all(steps)
    page.goto((tmp_path / "decode-scaling.svg").as_uri())
    assert page.locator("circle").count() > 8 and page.locator("parsererror").count() == 0
    page.close()
