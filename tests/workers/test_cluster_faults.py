"""Faults in clusters of processes on the CPU; tests/gpu/test_cluster_on_gpus.py has the same on GPUs."""

from __future__ import annotations

import gc
from contextlib import closing, contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workers import faults
from workers.faults import HARMLESS, Event, FaultsThatAllSurvive, Load, Mishaps, assert_serves
from workers.processes import what_is_held
from workers.serving import MIX, greedy, ids, prompt, sampled

ASKED = MIX + [(prompt(56, 9), greedy()), (prompt(40, 8), greedy(20)), (prompt(11, 7), sampled(3, max_tokens=16, seed=3))]


@pytest.fixture(scope="module")
def load(reference):
    whole = [[reference.answer(token_ids, sampling, index)[0] for index in range(sampling.n)] for token_ids, sampling in ASKED]
    return Load(list(zip(ids(*(token_ids for token_ids, _ in ASKED)), (sampling for _, sampling in ASKED))), whole)


def start(reference, topology, transport="auto"):
    return reference.cluster("disaggregated", topology, executor="process", transport=transport, checksums=True)


@contextmanager
def leaving_nothing():
    """No process, open file or shared memory."""
    gc.collect()
    before = what_is_held()
    yield
    gc.collect()
    assert what_is_held() == before


@pytest.fixture(scope="module")
def cluster(reference, load):
    """Transfers are written into the destination's memory. Each of the tests of lost workers loses one of it."""
    with leaving_nothing(), start(reference, "P:cpu P:cpu P:cpu D:cpu D:cpu D:cpu") as cluster:
        yield cluster


class TestFaultsThatAllSurvive(FaultsThatAllSurvive):
    """See there."""


# ------------------------------------------------------------------------------------------------- lost workers


@pytest.fixture(scope="module")
def relayed(reference, load):
    """Another, whose transfers need the receiver to take part."""
    with leaving_nothing(), start(reference, "P:cpu P:cpu D:cpu", "relay") as cluster:
        assert_serves(cluster, load)
        yield cluster


def test_p_is_killed_before_its_transfers(cluster, load):
    faults.lose_before_its_transfers(cluster, load, "P0")


def test_p_is_killed_amid_a_transfer(cluster, load):
    faults.lose_amid_a_transfer(cluster, load, "P1")


def test_d_is_killed_while_it_decodes(cluster, load):
    faults.lose_amid_decode(cluster, load, "D0")


def test_d_hangs(cluster, load, monkeypatch):
    faults.lose_by_hanging(cluster, load, "D1", monkeypatch)


def test_all_are_killed(cluster, load):
    faults.lose_all(cluster, load)


def test_p_is_killed_while_the_receiver_does_not_receive(relayed, load):
    faults.lose_with_the_receiver_stopped(relayed, load, "P0")


def test_p_is_killed_after_its_transfers(relayed, load):
    """The last one: what is asked later is told so."""
    faults.lose_after_its_transfers(relayed, load, "P1")
    error = relayed.generate(load.asked[0][0], load.asked[0][1], use_tqdm=False)[0].error
    assert error == "no prefill worker is left: P0 was lost (killed by SIGKILL); P1 was lost (killed by SIGKILL)"


# ------------------------------------------------------------------------------------------------ at any moment


class Clusters:
    """One after the other, as workers are killed."""

    def __init__(self, reference):
        self._reference = reference
        self._current = None

    def with_both_roles(self):
        if self._current is None or set(self._current._executor.roles.values()) != {"P", "D"}:
            self.close()
            self._current = start(self._reference, "P:cpu P:cpu D:cpu D:cpu")
        return self._current

    def close(self):
        if self._current is not None:
            self._current.shutdown()


def check_any_moment(reference, load, **options):
    """Events at moments that hypothesis chooses; it prints them when something is wrong."""
    whats = st.sampled_from((*HARMLESS, *HARMLESS, "kill"))
    events = st.lists(st.builds(Event, whats, st.integers(0, load.num_tokens), st.integers(0, 11)), min_size=1, max_size=5)

    @settings(deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck), **options)
    @given(events)
    def check(events):
        Mishaps(clusters.with_both_roles(), load).play(events)

    with leaving_nothing(), closing(Clusters(reference)) as clusters:
        check()


def test_faults_at_any_moment(reference, load):
    check_any_moment(reference, load, max_examples=10)


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_faults_at_any_moment_for_long(reference, load):
    check_any_moment(reference, load, max_examples=500)
