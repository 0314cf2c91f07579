"""A panel's figure: what the page is told of it, and when."""

from __future__ import annotations

import json

import plotly.graph_objects as go

from nanopd.widgets.figure import FigureView, Panel


def panel() -> Panel:
    return Panel(go.Figure(go.Scatter(x=[1, 2], y=[3, 4])))


def told(view: FigureView) -> list[float]:
    return json.loads(view._figure)["data"][0]["y"]


def test_the_page_is_told_of_all_changes_of_a_block_at_its_end():
    mine, news = panel(), []
    mine.view.observe(news.append, names="_figure")
    with mine.figure.batch_update():
        mine.figure.data[0].y = [5, 6]
        mine.figure.layout.title.text = "grown"
        mine.figure.add_scatter(y=[7])
        assert told(mine.view) == [3, 4] and not news
    assert told(mine.view) == [5, 6] and len(news) == 1
    assert json.loads(mine.view._figure)["layout"]["title"]["text"] == "grown"
    assert len(json.loads(mine.view._figure)["data"]) == 2


def test_a_block_that_changes_nothing_is_no_news():
    mine, news = panel(), []
    mine.view.observe(news.append, names="_figure")
    with mine.figure.batch_update():
        pass
    assert news == []


def test_plotly_js_comes_once():
    first, second = panel(), panel()
    assert first.view._library is second.view._library
    assert len(first.view._library.source) > 1_000_000 and len(json.dumps(first.view.get_state("_esm"))) < 10_000


def test_the_panel_leaves_the_figure_that_it_was_given():
    given = go.Figure(go.Scatter(y=[1]))
    mine = Panel(given)
    with mine.figure.batch_update():
        mine.figure.data[0].y = [2]
    assert list(given.data[0].y) == [1]
