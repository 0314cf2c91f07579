"""What is said of many requests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nanopd.config import SLO
from nanopd.metrics import Quantiles, meets, quantile, summarize


def one(arrival, ttft, tpot, num_tokens, mode="collocated"):
    return SimpleNamespace(arrival=arrival, ttft=ttft, tpot=tpot, num_tokens=num_tokens, mode=mode,
                           e2e=ttft + (tpot or 0) * (num_tokens - 1))


@pytest.mark.parametrize("share, value", [(0.0, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.9, 4), (1.0, 4)])
def test_a_quantile_is_the_least_value_that_so_many_do_not_exceed(share, value):
    assert quantile([4, 2, 3, 1], share) == value


def test_there_is_none_of_nothing():
    with pytest.raises(ValueError, match="no quantile of no values"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match="no request was served"):
        summarize([])


def test_a_summary():
    """Four requests over ten seconds: one is late with its first token, one with the others, and two meet the SLO."""
    served = [one(1.0, 0.5, 0.1, 11), one(2.0, 2.0, 0.1, 21, "disaggregated"), one(3.0, 0.5, 0.8, 11), one(4.0, 1.0, None, 1)]
    summary = summarize(served, SLO(ttft=1.0, tpot=0.1))
    assert summary.seconds == pytest.approx(10.5)
    assert summary.requests_per_second == pytest.approx(4 / 10.5)
    assert summary.tokens_per_second == pytest.approx(44 / 10.5)
    assert (summary.ttft, summary.tpot) == (Quantiles(0.5, 2.0, 2.0), Quantiles(0.1, 0.8, 0.8))
    assert summary.shares == {"collocated": 0.75, "disaggregated": 0.25}
    assert (summary.attainment, summary.goodput) == (0.5, pytest.approx(2 / 10.5))


def test_without_an_slo_and_without_second_tokens():
    summary = summarize([one(0.0, 1.0, None, 1)])
    assert (summary.tpot, summary.attainment, summary.goodput) == (None, None, None)


@pytest.mark.parametrize("ttft, tpot, met", [(1.0, 0.1, True), (1.01, 0.1, False), (1.0, 0.11, False), (1.0, None, True)])
def test_both_bounds_count(ttft, tpot, met):
    assert meets(one(0, ttft, tpot, 2), SLO(1.0, 0.1)) is met
