"""Poisson arrivals."""

from __future__ import annotations

from statistics import mean, pstdev

import pytest

from nanopd.config import ConfigError
from nanopd.simulator import poisson


def test_gaps_are_exponential_and_lengths_as_drawn():
    arrivals = poisson(50, 20_000, lambda random: (random.randint(1, 9), 7), seed=1)
    gaps = [later.time - earlier.time for earlier, later in zip(arrivals, arrivals[1:])]
    assert mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert pstdev(gaps) == pytest.approx(1 / 50, rel=0.03)  # of an exponential the same as its mean
    assert {arrival.prompt_len for arrival in arrivals} == set(range(1, 10))
    assert {arrival.output_len for arrival in arrivals} == {7}


@pytest.mark.parametrize("rate, num_requests, says", [
    (0, 5, "rate"), (-1, 5, "rate"), (float("inf"), 5, "rate"), (1, 0, "num_requests"),
])
def test_what_can_not_be(rate, num_requests, says):
    with pytest.raises(ConfigError, match=says):
        poisson(rate, num_requests, lambda random: (1, 1))
