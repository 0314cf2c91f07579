"""A load that a server can bear, and one that it can't, on the simulator: its capacity is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulator.clusters import simulation

from nanopd.benchmark.load import ClientRecord, Load, poisson_schedule, workload
from nanopd.benchmark.load.steady import FEWEST, open_requests, steadiness

CAPACITY = 81.6  # requests a second that this simulated worker ends when it never lacks any


def served(share: float, seed: int, warmup: float = 1.0, window: float = 4.0) -> Load:
    schedule = poisson_schedule(share * CAPACITY, workload("32-128/16-48"), window, warmup, seed=seed)
    result = simulation(seqs=8).run([replace(one, max_tokens=one.output_len) for one in schedule.arrivals])
    records = schedule.records()
    for record, one in zip(records, result.requests):
        record.sent = record.arrival
        record.tokens = [one.metrics.first_token_time, one.metrics.finish_time]
        record.end(one.metrics.finish_time, "completed")
    return Load(records, schedule.begin, schedule.end)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("share, is_steady", [(0.5, True), (0.8, True), (1.25, False), (1.6, False)])
def test_on_both_sides_of_saturation(share, seed, is_steady):
    found = steadiness(served(share, seed))
    assert found["is_steady"] is is_steady
    assert (found["why"] is None) is is_steady and ("pile up" in (found["why"] or "pile up"))


def test_a_server_that_never_answers_is_not_steady():
    load = Load([ClientRecord(0.1 * number, 5, 5, sent=0.1 * number) for number in range(100)], 0.0, 10.0)
    assert not steadiness(load)["is_steady"]


def test_too_few_requests_say_nothing():
    load = served(0.5, 0)
    few = Load(load.records[: FEWEST - 1], 0.0, load.records[FEWEST].arrival)
    assert f"{len(few.counted)} requests count: too few" in steadiness(few)["why"]


def test_how_many_are_open():
    """One from 0 to 3, one from 1 to 2, one that never ends from 2.5 on; and one that was not sent any more."""
    records = [ClientRecord(0.0, 5, 5, sent=0.0, ended=3.0), ClientRecord(1.0, 5, 5, sent=1.0, ended=2.0),
               ClientRecord(2.5, 5, 5, sent=2.5), ClientRecord(4.0, 5, 5)]
    assert open_requests(Load(records, 0.0, 4.0), spans=4) == pytest.approx(np.array([1.0, 2.0, 1.5, 1.0]))
