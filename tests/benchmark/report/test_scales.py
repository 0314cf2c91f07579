"""From values to pixels, and the numbers at an axis."""

from __future__ import annotations

import pytest

from nanopd.benchmark.report.scales import Scale, number, spread


@pytest.mark.parametrize(("scale", "value", "pixel"), [
    (Scale(0, 10, 100, 200), 2.5, 125), (Scale(0, 10, 200, 100), 2.5, 175), (Scale(1, 100, 0, 200, True), 10, 100),
    (Scale(1, 100, 0, 200, True), 0, 0), (Scale(9.5, -0.5, 0, 100), 9.5, 0)])
def test_at(scale, value, pixel):
    assert scale.at(value) == pytest.approx(pixel)


@pytest.mark.parametrize(("low", "high", "count", "ticks"), [
    (0, 10, 5, [0, 2, 4, 6, 8, 10]), (-0.5, 9.5, 5, [0, 2, 4, 6, 8]), (0, 0.031, 3, [0, 0.02]), (9.5, -0.5, 5, [0, 2, 4, 6, 8])])
def test_linear_ticks_are_round(low, high, count, ticks):
    assert Scale(low, high, 0, 100).ticks(count) == pytest.approx(ticks)


@pytest.mark.parametrize(("low", "high", "count", "ticks"), [
    (1, 1000, 4, [1, 10, 100, 1000]), (30, 300, 4, [50, 100, 200]), (0.8, 40, 5, [1, 2, 5, 10, 20])])
def test_log_ticks_are_decades_or_finer(low, high, count, ticks):
    assert Scale(low, high, 0, 100, True).ticks(count) == pytest.approx(ticks)


def test_a_range_holds_its_values():
    low, high = spread([3.0, 7.0], False, to_zero=False)
    assert low < 3 and high > 7
    assert spread([3.0, 7.0], False, to_zero=True)[0] == 0
    low, high = spread([50.0], True, to_zero=False)
    assert low < 50 < high and high / low > 3
    assert spread([0.0, 5.0, 10.0], True, to_zero=False)[0] > 0
    assert spread([2.0, 2.0], False, to_zero=False) == pytest.approx((1.46, 2.54))
    assert spread([-0.5, 4.5], False, to_zero=False, is_padded=False) == (-0.5, 4.5)


@pytest.mark.parametrize(("value", "tickformat", "text"), [(12000.0, None, "12,000"), (0.25, ".0%", "25%"), (0.1 + 0.2, None, "0.3")])
def test_numbers(value, tickformat, text):
    assert number(value, tickformat) == text
