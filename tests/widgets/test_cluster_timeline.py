"""The cluster timeline puts steps and transfers of several workers on one clock, and shows what of a transfer was exposed."""

from __future__ import annotations

import pytest

from nanopd.core import RowRecord, StepRecord, TransferRecord
from nanopd.messages import History
from nanopd.widgets.cluster_timeline import EXPOSED_COLOUR, KINDS, ClusterTimeline, Lane, exposed
from nanopd.widgets.strings import set_language


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


def step(number, start, duration, *rows):
    records = tuple(RowRecord(request, 0, kind, new, 0) for request, kind, new in rows)
    return StepRecord(number, start, records, (), 0, 8, 0, duration)


def transfer(request, start, computed, end):
    return TransferRecord(request, "D0", "peer", 60, 4000, start, computed, end)


def histories():
    """P0 reads a and b; a leaves while it is read, b is late by 5 ms; D0 writes both."""
    return {
        "P0": History([step(0, 100.0, 0.02, ("a", "prefill", 60)), step(1, 100.02, 0.02, ("b", "prefill", 60), ("c", "prefill", 4))],
                      [transfer("a", 100.01, 100.02, 100.02), transfer("b", 100.03, 100.04, 100.045)]),
        "D0": History([step(0, 100.025, 0.01, ("a", "decode", 1)), step(1, 100.05, 0.01, ("a", "decode", 1), ("b", "decode", 1))], []),
    }


def of_kind(panel, kind):
    return [bar for bar in panel.bars() if bar.kind == kind]


def test_each_worker_has_a_lane_and_one_for_transfers_where_there_are_any():
    panel = ClusterTimeline(histories())
    assert panel.lanes == [Lane("P0", False), Lane("P0", True), Lane("D0", False)]
    assert list(panel.figure.layout.yaxis.ticktext) == ["<b>P0</b> steps", "<b>P0</b> transfers", "<b>D0</b> steps"]


def test_bars_lie_where_they_were_on_the_common_clock():
    panel = ClusterTimeline(histories())
    a, b, c = of_kind(panel, "prefill")
    assert (a.start, a.width, a.height) == pytest.approx((0, 20, 1))
    assert (b.start, b.width, b.top, b.height) == pytest.approx((20, 20, 0, 0.5)) and c.top == pytest.approx(0.5)
    assert [round(bar.start) for bar in of_kind(panel, "decode")] == [25, 50, 50]
    assert "60 new tokens" in a.hover and "prefill" in a.hover


def test_a_request_has_one_colour_everywhere_and_what_is_exposed_has_its_own():
    panel = ClusterTimeline(histories())
    colours = {kind: list(trace.marker.color) for kind, trace in zip(KINDS, panel.figure.data)}
    assert colours["transfer"] == colours["prefill"][:2] and colours["decode"] == [colours["prefill"][0], *colours["prefill"][:2]]
    assert len(set(colours["prefill"])) == 3 and colours["exposed"] == [EXPOSED_COLOUR]


def test_a_retry_has_its_requests_colour():
    steps = [step(0, 1.0, 0.1, ("7", "prefill", 4), ("8", "prefill", 4)), step(1, 2.0, 0.1, ("7/1", "prefill", 4))]
    first, other, again = ClusterTimeline({"P0": History(steps, [])}).figure.data[0].marker.color
    assert first == again != other


def test_only_what_came_after_the_computation_is_exposed():
    hidden, late = histories()["P0"].transfers
    assert exposed(hidden) == 0 and exposed(late) == pytest.approx(0.005)
    assert exposed(transfer("short", 100.06, 100.05, 100.07)) == pytest.approx(0.01), "sent after the computation: all of it"
    [bar] = of_kind(ClusterTimeline(histories()), "exposed")
    assert (bar.request_id, bar.start, bar.width) == ("b", pytest.approx(40), pytest.approx(5))


def test_transfers_that_overlap_do_not_hide_each_other():
    transfers = [transfer("a", 1.0, 1.5, 1.5), transfer("b", 1.2, 1.6, 1.6), transfer("c", 1.55, 1.7, 1.7)]
    panel = ClusterTimeline({"P0": History([], transfers)})
    tops = {bar.request_id: bar.top for bar in of_kind(panel, "transfer")}
    assert tops == {"a": 0, "b": 0.5, "c": 0}


def test_what_happened_is_revealed_in_its_order():
    panel = ClusterTimeline(histories())
    assert panel.slider.max == 6 and "D0" in panel.message.value
    frame = panel.figure.layout.xaxis.range
    panel.go_to(0)
    assert panel.bars() == [] and panel.message.value == "Nothing has happened yet."
    panel.step_button.click()
    assert [bar.request_id for bar in panel.bars()] == ["a"] and "prefill 1 (60 tokens)" in panel.message.value
    panel.step()
    assert "request a leaves for D0 (peer)" in panel.message.value and "0.00 ms exposed" in panel.message.value
    panel.go_to(5)
    assert "5.00 ms exposed" in panel.message.value
    panel.back()
    assert panel.figure.layout.xaxis.range == frame
    assert panel.snapshot().layout.title.text == panel.sentence


def test_nothing_to_show_says_so():
    panel = ClusterTimeline({"P0": History([], [])})
    assert panel.bars() == [] and "histories are empty" in panel.message.value


def test_names_of_requests_are_no_markup():
    panel = ClusterTimeline({"P0": History([step(0, 0.0, 1.0, ("<b>x", "prefill", 1))], [])})
    assert "&lt;b&gt;x" in panel.bars()[0].hover
