"""Processes stay on the CPUs next to their GPU, where the system says which those are."""

from __future__ import annotations

import os

import pytest

from nanopd.workers.affinity import bind, parse_cpus

GPU = "0000:1b:00.0"

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")


@pytest.fixture
def usable():
    """The CPUs that this process may use; the test leaves them as they were."""
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


@pytest.fixture
def devices(tmp_path):
    """A folder like /sys/bus/pci/devices."""
    (tmp_path / GPU).mkdir()
    return tmp_path


def test_cpu_lists_are_read_as_the_system_writes_them():
    assert parse_cpus("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpus("7\n") == {7} and parse_cpus("\n") == set()


def test_a_process_keeps_to_the_near_ones_of_those_it_may_use(usable, devices):
    near = max(usable)
    (devices / GPU / "local_cpulist").write_text(f"{near},{near + 1000}-{near + 1003}\n")
    bind(GPU, devices)
    assert os.sched_getaffinity(0) == {near}


@pytest.mark.parametrize("text", [None, "\n", "100000\n", "all of them\n"])
def test_where_that_says_nothing_of_use_it_runs_where_it_may(usable, devices, text):
    if text is not None:
        (devices / GPU / "local_cpulist").write_text(text)
    bind(GPU, devices)
    assert os.sched_getaffinity(0) == usable
