"""Poisson arrivals, and lengths by name."""

from __future__ import annotations

from random import Random
from statistics import mean, pstdev

import pytest

from nanopd.config import ConfigError
from nanopd.simulator import Arrival, lengths, poisson


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


@pytest.mark.parametrize("prompts, spans", [
    ("short", [(64, 256)]), ("long", [(1024, 2048)]), ("mixed", [(64, 256), (1024, 2048)]), ("7", [(7, 7)]), ("5-9", [(5, 9)]),
])
def test_lengths(prompts, spans):
    draw, random = lengths(prompts, "3-4"), Random(1)
    drawn = [draw(random) for _ in range(4000)]
    for low, high in spans:
        inside = [prompt for prompt, _ in drawn if low <= prompt <= high]
        assert len(inside) == pytest.approx(4000 / len(spans), rel=0.1)
        assert (min(inside), max(inside)) == (pytest.approx(low, abs=10), pytest.approx(high, abs=10))
    assert {answer for _, answer in drawn} == {3, 4}


@pytest.mark.parametrize("prompts, outputs, says", [
    ("tiny", "128", "prompts is short, long, mixed, a number of tokens or a span of them such as 64-256, got 'tiny'"),
    ("9-5", "128", "prompts is .* got '9-5'"), ("short", "0", "outputs is a number of tokens or .* got '0'"),
])
def test_lengths_that_can_not_be(prompts, outputs, says):
    with pytest.raises(ConfigError, match=says):
        lengths(prompts, outputs)


def test_no_two_prompts_begin_alike_unless_they_share_a_prefix():
    first, second = Arrival(0, 40, 1).prompt(0), Arrival(0, 40, 1).prompt(1)
    assert first[0] != second[0] and len(first) == len(second) == 40
    assert Arrival(0, 600, 1, prefix=(3,)).prompt(0)[512] != Arrival(0, 600, 1, prefix=(3,)).prompt(1)[512]
