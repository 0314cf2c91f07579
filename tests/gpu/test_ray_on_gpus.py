"""Workers as Ray actors, each with a GPU that Ray has chosen: the same tokens over NCCL, and memory given back."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager

import pytest
from gpu.test_cluster_on_gpus import (
    OPTIONS,
    assert_tokens_equal_the_cpu_s,
    expected,
    free_memory,
    settle,
    two_gpus,
)
from workers import faults
from workers.faults import Load
from workers.processes import is_alive, wait_until
from workers.ray_cluster import DIED, environment

from nanopd import Cluster

pytestmark = [pytest.mark.gpu, two_gpus, pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install 'nanopd[ray]')")]


@pytest.fixture(scope="module", autouse=True)
def ray_environment():
    with environment():
        yield


@pytest.fixture(scope="module")
def load() -> Load:
    return expected()[0]


@contextmanager
def started(topology: str):
    settle()
    before = free_memory()
    with Cluster("tiny", topology, "disaggregated", enforce_eager=True, **OPTIONS | dict(executor="ray")) as cluster:
        workers = {status.pid for status in cluster.status().values()}
        yield cluster
    settle()
    assert wait_until(lambda: not any(map(is_alive, workers)))
    assert wait_until(lambda: all(now - then > -2**26 for now, then in zip(free_memory(), before))), (before, free_memory())


def test_tokens_over_nccl(load):
    """Each host sees one GPU, and it is not the same one."""
    before = free_memory()
    with started("P:0 D:1 P:1") as cluster:
        addresses = [address for host in cluster._executor._hosts for address in host.ready.addresses.values()]
        assert {str(address.device) for address in addresses} == {"cuda:0"} and {address.host for address in addresses} == {0, 1}
        assert sum(then - now > 2**26 for now, then in zip(free_memory(), before)) == 2
        assert cluster.device_name.startswith("NVIDIA")
        assert_tokens_equal_the_cpu_s(cluster, load, {"collective", "local"})


def test_d_is_killed_while_it_decodes(load):
    with started("P:0 D:0 D:1") as cluster:
        faults.lose_amid_decode(cluster, load, "D1", DIED)


def test_p_is_killed_before_its_transfers(load):
    with started("P:0 D:1 P:1") as cluster:
        faults.lose_before_its_transfers(cluster, load, "P0", DIED)
