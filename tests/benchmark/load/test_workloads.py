"""Workloads by name."""

from __future__ import annotations

from random import Random

import pytest

from nanopd.benchmark.load import workload
from nanopd.benchmark.load.workloads import NAMES
from nanopd.config import ConfigError


def drawn(name, number=500):
    random, draw = Random(0), workload(name)
    return [draw(random) for _ in range(number)]


@pytest.mark.parametrize("name, prompts, outputs", [
    ("short", (64, 256), (128, 128)), ("long", (1024, 2048), (128, 128)), ("mixed", (64, 2048), (128, 128)),
    ("16-64/8", (16, 64), (8, 8)), ("7/1-3", (7, 7), (1, 3)), ("long/5", (1024, 2048), (5, 5))])
def test_lengths(name, prompts, outputs):
    for found, (least, most) in zip(zip(*drawn(name)), (prompts, outputs)):
        assert least <= min(found) <= max(found) <= most
        assert max(found) - min(found) >= 0.9 * (most - least)


def test_mixed_has_nothing_between_short_and_long():
    prompts = [prompt for prompt, _ in drawn("mixed")]
    assert not [prompt for prompt in prompts if 256 < prompt < 1024]
    assert 200 < sum(prompt <= 256 for prompt in prompts) < 300


def test_recorded_ones():
    """Means of the traces, which have no others of so short answers and so long prompts."""
    prompt, answer = (sum(column) / 5000 for column in zip(*drawn("azure-code", 5000)))
    assert 1900 < prompt < 2200 and 24 < answer < 32
    prompt, answer = (sum(column) / 5000 for column in zip(*drawn("mooncake", 5000)))
    assert 14_500 < prompt < 16_100 and 140 < answer < 160


@pytest.mark.parametrize("name", ["", "huge", "64", "64/", "/8", "64-32/8", "64/none", "azure-code/5"])
def test_what_is_none_is_said_with_what_there_is(name):
    with pytest.raises(ConfigError) as error:
        workload(name)
    assert all(known in str(error.value) for known in NAMES) or "64-256" in str(error.value)
