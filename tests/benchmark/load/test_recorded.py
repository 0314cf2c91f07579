"""The tables of the published traces, beside the traces."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import numpy as np
import pytest
from scipy.stats import spearmanr

from nanopd.benchmark.load.recorded import SOURCES, STRATA, LengthTable
from nanopd.simulator.traces import read_trace

TRACES = Path(os.environ.get("NANOPD_TRACES", "traces"))  # the folder that holds the traces, where somebody has them
FILES = {"azure-code": "azure_llm_code_2023.csv", "mooncake": "mooncake_synthetic_2025.jsonl"}


def draws(table, number=10_000):
    random = Random(0)
    return np.array([table(random) for _ in range(number)])


def recorded(name):
    if not (TRACES / FILES[name]).exists():
        pytest.skip(f"needs {TRACES / FILES[name]}")
    return [(one.prompt_len, one.output_len) for one in read_trace(TRACES / FILES[name])]


@pytest.mark.parametrize("name", FILES)
def test_the_table_is_that_of_the_trace(name):
    assert LengthTable.load(name) == LengthTable.of(SOURCES[name], recorded(name))


@pytest.mark.parametrize("name", FILES)
def test_draws_are_as_long_as_the_trace_s_requests(name):
    trace, drawn = np.array(recorded(name)), draws(LengthTable.load(name))
    assert drawn.mean(axis=0) == pytest.approx(trace.mean(axis=0), rel=0.05)
    for share in (0.25, 0.5, 0.75, 0.9):
        assert np.quantile(drawn, share, axis=0) == pytest.approx(np.quantile(trace, share, axis=0), rel=0.15, abs=3)
    assert spearmanr(*drawn.T)[0] == pytest.approx(spearmanr(*trace.T)[0], abs=0.05)


@pytest.mark.parametrize("name", FILES)
def test_what_comes_with_the_package_can_be_drawn(name):
    table = LengthTable.load(name)
    assert table.source == SOURCES[name] and len(table.prompts) == len(table.outputs) == STRATA
    assert draws(table, 1000).min() >= 1


def test_long_prompts_with_short_answers_stay_so():
    """A made-up trace, of which no stratum has both."""
    lengths = [(100 + number, 2100 - number) for number in range(2000)]
    table = LengthTable.of("made up", lengths)
    drawn = draws(table, 4000)
    assert np.abs(drawn.sum(axis=1) - 2200).max() <= 100  # a stratum is 100 requests wide
    assert spearmanr(*drawn.T)[0] < -0.99
    assert drawn.mean(axis=0) == pytest.approx([1099.5, 1100.5], rel=0.03)


def test_a_table_that_was_saved_is_loaded(tmp_path, monkeypatch):
    from nanopd.benchmark.load import recorded as module

    monkeypatch.setattr(module, "TABLES", tmp_path)
    table = LengthTable.of("made up", [(number, 2 * number) for number in range(1, 2001)])
    table.save("mine")
    assert LengthTable.load("mine") == table
