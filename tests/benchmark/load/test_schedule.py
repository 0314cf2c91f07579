"""Who is due when, and who counts."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest

from nanopd.benchmark.load import poisson_schedule, trace_schedule
from nanopd.config import ConfigError
from nanopd.simulator.workload import Arrival, lengths

DRAW = lengths("16-64", "8")


def test_the_same_seed_gives_the_same_arrivals_and_another_one_others():
    first, again, other = (poisson_schedule(20.0, DRAW, 10.0, 2.0, 3.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_it_lasts_as_long_as_its_spans_and_counts_what_is_due_in_the_window():
    schedule = poisson_schedule(50.0, DRAW, window=10.0, warmup=2.0, tail=3.0)
    times = [arrival.time for arrival in schedule.arrivals]
    assert times == sorted(times) and 14 < times[-1] < 15
    counted = [record.arrival for record in schedule.records() if record.counts]
    assert counted == [time for time in times if 2.0 <= time < 12.0] and 350 < len(counted) < 650


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_that_were_asked_for(burstiness):
    times = [arrival.time for arrival in poisson_schedule(100.0, DRAW, 100.0, burstiness=burstiness).arrivals]
    gaps = [after - before for before, after in zip(times, times[1:])]
    assert fmean(gaps) == pytest.approx(0.01, rel=0.1)
    assert stdev(gaps) / fmean(gaps) == pytest.approx(1 / math.sqrt(burstiness), rel=0.1)


def test_a_trace_is_cut_to_its_spans():
    trace = [Arrival(float(number), 10, 5) for number in range(10)]
    schedule = trace_schedule(trace, window=4.0, warmup=2.0, tail=1.0)
    assert [arrival.time for arrival in schedule.arrivals] == list(range(7))
    assert [record.arrival for record in schedule.records() if record.counts] == [2, 3, 4, 5]
    whole = trace_schedule(trace, warmup=2.0)
    assert len(whole.arrivals) == 10 and sum(record.counts for record in whole.records()) == 8


@pytest.mark.parametrize("spans", [(0.0, 0.0, 0.0), (math.nan, 0.0, 0.0), (1.0, -1.0, 0.0), (1.0, 0.0, math.inf)])
def test_spans_have_to_be_numbers_of_seconds(spans):
    with pytest.raises(ConfigError, match="number of seconds"):
        poisson_schedule(1.0, DRAW, *spans)


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"rate": 1.0, "burstiness": 0.0}])
def test_rate_and_burstiness_are_above_0(options):
    with pytest.raises(ConfigError, match="above 0"):
        poisson_schedule(lengths=DRAW, window=1.0, **options)
