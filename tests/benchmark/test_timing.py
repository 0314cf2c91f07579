from __future__ import annotations

import pytest

from nanopd.benchmark import timing


def test_calls_in_turns_meet_the_same_clock(monkeypatch) -> None:
    """On a GPU that gets slower all the time, the same work twice takes as long, and twice the work twice as long."""
    now, speed = 0.0, 1.0

    def work(us: float) -> None:
        nonlocal now, speed
        now += us / speed
        speed *= 0.999

    def span_us(call) -> float:
        start = now
        call()
        return now - start

    monkeypatch.setattr(timing, "_span_us", span_us)
    first, again, double = timing.eager_us([lambda: work(100), lambda: work(100), lambda: work(200)], least_us=1000)
    assert again == pytest.approx(first, rel=0.03)
    assert double == pytest.approx(2 * first, rel=0.03)
