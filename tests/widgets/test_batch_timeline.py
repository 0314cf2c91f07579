"""The batch timeline shows every row of every step, once, and reveals them step by step."""

from __future__ import annotations

from collections import deque

import pytest

from nanopd.core import RowRecord, StepRecord
from nanopd.widgets import batch_timeline
from nanopd.widgets.batch_timeline import BUDGET, DECODE, MARKS, PREFILL, BatchTimeline, Lane
from nanopd.widgets.strings import set_language


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


def step(number, *rows, preempted=(), duration=0.01, free=8):
    records = tuple(RowRecord(request, index, kind, new, cached) for request, index, kind, new, cached in rows)
    return StepRecord(number, 0.0, records, tuple(preempted), 1, free, 0, duration)


def history():
    return deque([
        step(0, ("a", 0, "prefill", 60, 0), ("b", 0, "prefill", 4, 0), duration=0.03),
        step(1, ("a", 0, "decode", 1, 60), ("b", 0, "prefill", 16, 4)),
        step(2, ("a", 0, "decode", 1, 61), preempted=["b"], free=0),
        step(3, ("a", 0, "decode", 1, 62), ("a", 1, "decode", 1, 62)),
    ])


def test_every_row_is_one_bar_of_its_kind_with_its_numbers():
    panel = BatchTimeline(history(), token_budget=64)
    prefill, decode = panel.figure.data[PREFILL], panel.figure.data[DECODE]
    assert list(prefill.text) == ["60", "4", "16"] and list(prefill.base) == [-0.5, -0.5, 0.5]
    assert list(decode.base) == [0.5, 1.5, 2.5, 2.5] and list(decode.y) == [0, 0, 0, 2]
    assert prefill.width[0] > prefill.width[2] > prefill.width[1] > decode.width[0]
    assert "60 new tokens after 0 in the cache" in prefill.hovertext[0] and "30 ms" in prefill.hovertext[0]
    assert list(panel.figure.layout.yaxis.ticktext) == ["a.0", "b", "a.1"]
    assert list(panel.figure.data[BUDGET].y) == [64, 64]


def test_a_preemption_is_marked_on_the_lane_of_its_request():
    panel = BatchTimeline(history())
    marks = panel.figure.data[MARKS]
    assert (list(marks.x), list(marks.y)) == ([2], [1])
    panel.go_to(3)
    assert "preempted: b" in panel.message.value and "0 free blocks" in panel.message.value
    panel.go_to(2)
    assert not panel.figure.data[MARKS].x


def test_steps_are_revealed_one_by_one_in_a_frame_that_stays():
    panel = BatchTimeline(history())
    frame = (panel.figure.layout.xaxis.range, panel.figure.layout.height)
    panel.go_to(0)
    assert panel.bars() == [] and panel.message.value == "No step has run yet."
    panel.step_button.click()
    assert [bar.row.num_new for bar in panel.bars()] == [60, 4]
    panel.slider.value = 2
    assert list(panel.figure.data[BUDGET + 1].y) == [64, 64, 17, 17]
    assert list(panel.figure.data[BUDGET + 2].y) == [8, 8, 8, 8]
    panel.back()
    assert (panel.figure.layout.xaxis.range, panel.figure.layout.height) == frame


def test_against_time_a_step_is_as_wide_as_it_took():
    panel = BatchTimeline(history())
    panel.show_by("time")
    first, *_, last = panel.bars()
    assert (first.start, first.width) == (0, 30)
    assert (last.start, last.width) == pytest.approx((50, 10))
    assert panel.figure.layout.xaxis.range == pytest.approx((0, 60))
    assert "ms" in panel.figure.layout.xaxis3.title.text


def test_several_workers_have_lanes_of_their_own():
    panel = BatchTimeline({"P0": history(), "D0": [step(0, ("a", 0, "decode", 1, 60))]})
    lanes = panel._lanes()
    assert lanes[0] == Lane("P0", "a", 0) and lanes[-1] == Lane("D0", "a", 0)
    assert "<b>D0</b> · a.0" in panel.figure.layout.yaxis.ticktext
    panel.go_to(1)
    assert panel.message.value.count("step 0") == 2
    assert "each worker" in panel.figure.layout.xaxis3.title.text
    assert [trace.name for trace in panel.figure.data[BUDGET + 1 :]] == ["P0", "P0", "D0", "D0"]


def test_refresh_follows_the_engine_only_if_the_end_was_shown():
    steps = history()
    panel = BatchTimeline(steps)
    steps.append(step(4, ("a", 0, "decode", 1, 63)))
    panel.refresh()
    assert panel.position == 5
    panel.go_to(2)
    steps.append(step(5, ("a", 0, "decode", 1, 64)))
    panel.refresh()
    assert (panel.position, panel.slider.max) == (2, 6)


def test_a_long_history_is_seen_through_a_window(monkeypatch):
    monkeypatch.setattr(batch_timeline, "MAX_STEPS", 10)
    panel = BatchTimeline([step(100 + i, ("a", 0, "decode", 1, i)) for i in range(50)])
    assert len(panel.bars()) == 10 and tuple(panel.figure.layout.xaxis.range) == (139.5, 149.5)
    panel.go_to(3)
    assert len(panel.bars()) == 3 and tuple(panel.figure.layout.xaxis.range) == (99.5, 109.5)


@pytest.mark.parametrize("histories", [deque(), {}, {"P0": deque(), "D0": deque()}])
def test_an_empty_history_is_said_to_be_empty(histories):
    panel = BatchTimeline(histories, token_budget=64)
    assert "empty" in panel.message.value
    panel.show_by("time")
    panel.step()


def test_the_snapshot_is_static_and_in_the_readers_language():
    set_language("zh")
    figure = BatchTimeline({"P0": history()}).snapshot()
    assert type(figure).__name__ == "Figure" and "第 3 步" in figure.layout.title.text
    assert figure.data[PREFILL].name == "预填充"
