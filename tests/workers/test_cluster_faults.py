"""Faults in clusters of processes on the CPU; tests/gpu/test_cluster_on_gpus.py has the same on GPUs."""

from __future__ import annotations

import gc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workers import faults
from workers.faults import HARMLESS, Event, FaultsThatAllSurvive, Load, Mishaps, assert_serves, workers_of
from workers.processes import what_is_held
from workers.serving import MIX, greedy, ids, prompt, sampled

ASKED = MIX + [(prompt(56, 9), greedy()), (prompt(40, 8), greedy(20)), (prompt(11, 7), sampled(3, max_tokens=16, seed=3))]


@pytest.fixture(scope="module")
def load(reference):
    whole = [[reference.answer(token_ids, sampling, index)[0] for index in range(sampling.n)] for token_ids, sampling in ASKED]
    return Load(list(zip(ids(*(token_ids for token_ids, _ in ASKED)), (sampling for _, sampling in ASKED))), whole)


def start(reference, topology, transport="auto"):
    return reference.cluster("disaggregated", topology, executor="process", transport=transport, checksums=True)


@pytest.fixture(scope="module")
def cluster(reference, load):
    gc.collect()
    before = what_is_held()
    with start(reference, "P:cpu D:cpu P:cpu") as cluster:
        assert_serves(cluster, load)
        yield cluster
    gc.collect()
    assert what_is_held() == before


class TestFaultsThatAllSurvive(FaultsThatAllSurvive):
    pass
