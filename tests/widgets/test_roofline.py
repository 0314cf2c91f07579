"""The roofline puts points where their numbers say; it makes up none."""

from __future__ import annotations

import pytest

from nanopd.widgets.roofline import MARKS, ROOF, Roofline
from nanopd.widgets.strings import set_language


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


def test_the_roof_bends_at_the_ridge():
    panel = Roofline(peak_flops=1000e12, bandwidth=4e12)
    assert panel.ridge == 250 and panel.roof(25) == 100e12 and panel.roof(1e4) == 1000e12
    roof = panel.figure.data[ROOF]
    assert roof.x[1] == 250 and roof.y[1] == roof.y[2] == 1000e12
    assert roof.y[0] == pytest.approx(roof.x[0] * 4e12)


def test_points_sit_at_their_intensity_and_rate_and_tell_their_share_of_the_roof():
    panel = Roofline(1000e12, 4e12, [("prefill", 1e12, 1e9, 2e-3)])
    panel.add_point("decode", 2e9, 2e9, 1e-3)
    marks = panel.figure.data[MARKS]
    assert (list(marks.x), list(marks.y)) == ([1000, 1], [5e14, 2e12])
    assert "compute-bound" in marks.hovertext[0] and "500 TFLOP/s: 50% of its roof" in marks.hovertext[0]
    assert "memory-bound" in marks.hovertext[1] and "2 TFLOP/s: 50% of its roof" in marks.hovertext[1]
    assert list(panel.snapshot().data[MARKS].x) == [1000, 1]


def test_points_far_off_are_inside_the_frame():
    panel = Roofline(1e12, 1e11, [("cpu", 10, 1e6, 1.0), ("dense", 1e18, 1e3, 1e7)])
    low, high = panel.figure.layout.xaxis.range
    assert low < -5 and high > 15 and panel.figure.layout.yaxis.range[0] < 1


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, -1), (float("nan"), 1, 1), (1, 1, float("inf"))])
def test_numbers_that_measure_nothing_are_refused_and_nothing_is_added(numbers):
    panel = Roofline(1e12, 1e11)
    with pytest.raises(ValueError, match="above 0"):
        panel.add_point("odd", *numbers)
    assert panel.points == []
    with pytest.raises(ValueError, match="bandwidth"):
        Roofline(1e12, 0)
