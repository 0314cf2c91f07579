"""Workers as Ray actors: the same tokens, whoever dies; and nothing of them or of Ray is left."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time

import pytest
from workers import faults
from workers.faults import Load, assert_idle, assert_serves
from workers.processes import is_alive, wait_until
from workers.ray_cluster import ADDRESSES, DIED, descendants, environment, two_nodes
from workers.serving import (
    MIX,
    OPTIONS,
    assert_tokens_equal_reference,
    greedy,
    ids,
    prompt,
    sampled,
    serve_mix,
)

from nanopd import ConfigError
from nanopd.workers import actors
from nanopd.workers.network import Gate, Network

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed (pip install 'nanopd[ray]')")
SPREAD = {"disaggregated": "P:cpu P:cpu D:cpu D:cpu", "collocated": "C:cpu C:cpu C:cpu C:cpu"}  # over both nodes
ASKED = MIX + [(prompt(56, 9), greedy()), (prompt(40, 8), greedy(20)), (prompt(11, 7), sampled(3, max_tokens=16, seed=3))]


@pytest.fixture(scope="module")
def ray_environment():
    with environment():
        yield


@pytest.fixture(scope="module")
def nodes(ray_environment):
    """Two nodes with two CPUs each, which whoever joins a Ray cluster joins."""
    with two_nodes(num_cpus=2) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", address)
        yield address


@pytest.fixture(scope="module")
def load(reference):
    whole = [[reference.answer(token_ids, sampling, index)[0] for index in range(sampling.n)] for token_ids, sampling in ASKED]
    return Load(list(zip(ids(*(token_ids for token_ids, _ in ASKED)), (sampling for _, sampling in ASKED))), whole)


def start(reference, mode="disaggregated", topology=None, **options):
    return reference.cluster(mode, topology or SPREAD[mode], executor="ray", **options)


def pids(cluster):
    return {status.pid for status in cluster.status().values()}


def doors(cluster):
    """The addresses on which workers wait for caches."""
    return [address.door.address[0] for host in cluster._executor._hosts for address in host.ready.addresses.values()]


def assert_gone(processes):
    assert wait_until(lambda: not any(map(is_alive, processes)))


# ----------------------------------------------------------------------------------------------- without a cluster


@needs_ray
def test_without_a_ray_cluster_it_has_one_of_its_own_for_as_long_as_it_lives(reference, ray_environment):
    import ray

    before = descendants()
    with start(reference, topology="P:cpu D:cpu") as cluster:
        outputs = serve_mix(cluster, MIX * 2)
        assert_tokens_equal_reference(outputs, MIX * 2, reference)
        started = descendants() - before
        assert pids(cluster) <= started and len(pids(cluster)) == 2
        assert doors(cluster) == ["127.0.0.1"] * 2
        assert {sent.transport for history in cluster.history().values() for sent in history.transfers} == {"collective"}
        assert all(0 <= output.metrics.ttft < 60 for output in outputs)
        assert_idle(cluster)
    assert not ray.is_initialized()
    assert_gone(started)


def test_without_ray_it_says_what_to_install(reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray: pip install 'nanopd\[ray\]'"):
        start(reference)


@pytest.mark.parametrize("address, message", [
    ("ray://10.0.0.1:10001", "has to be HOST:PORT"), ("10.0.0.1", "has to be HOST:PORT"),
    ("127.0.0.1:9", "nothing answers at RAY_ADDRESS 127.0.0.1:9"),
])
def test_an_address_at_which_there_is_no_ray(address, message):
    with pytest.raises(ConfigError, match=message):
        actors._check_address(address)


# ---------------------------------------------------------------------------------------------------- two nodes


@needs_ray
@pytest.mark.nightly
class TestTwoNodes:
    @pytest.mark.parametrize("mode", SPREAD)
    def test_tokens_are_those_of_the_dense_model_and_of_the_inline_executor(self, nodes, reference, mode):
        with start(reference, mode) as cluster:
            outputs = serve_mix(cluster, MIX * 2)
            assert_tokens_equal_reference(outputs, MIX * 2, reference)
            with reference.cluster(mode) as inline:
                theirs = serve_mix(inline, MIX * 2)
            assert [[answer.token_ids for answer in output.outputs] for output in outputs] == [
                [answer.token_ids for answer in output.outputs] for output in theirs]
            workers = pids(cluster)
            assert len(workers) == 4 and sorted(doors(cluster)) == sorted(ADDRESSES * 2)
            assert_idle(cluster)
        assert_gone(workers)

    def test_room_is_given_back_and_asked_for_in_words(self, nodes, reference):
        """What another one has just given back is there for the next, and a Ray that was there stays."""
        import ray

        ray.init(nodes, log_to_driver=False)
        try:
            for topology, mode, message in [
                    ("C:cpu " * 5, "collocated", "needs 5 CPUs of the Ray cluster, which has 4 CPUs, of that free: 4 CPUs"),
                    ("P:0 D:1", "disaggregated", "needs 2 GPUs of the Ray cluster, which has 4 CPUs")]:
                begin = time.monotonic()
                with pytest.raises(ConfigError, match=message):
                    start(reference, mode, topology)
                assert time.monotonic() - begin < actors.PLACING_TIME + 10
            with start(reference) as cluster:
                assert_serves_mix(cluster, reference)
            assert wait_until(lambda: ray.available_resources().get("CPU") == 4)
        finally:
            ray.shutdown()

    def test_what_kept_a_host_from_starting_is_said_in_its_own_words(self, nodes, reference):
        before = descendants()
        with pytest.raises(ConfigError, match="no room for a KV cache of 1000000000000 blocks"):
            start(reference, num_gpu_blocks_override=10**12)
        assert wait_until(lambda: len(descendants() - before) == 0)

    def test_a_host_that_does_not_know_the_secret(self, nodes, reference, monkeypatch):
        """Whoever calls without it is no host of ours; here none has it, and so there is none."""
        monkeypatch.setattr(actors, "Gate", lambda network: Gate(Network(network.address, b"another")))
        with pytest.raises(RuntimeError, match="did not start: 127.0.0.. can't get through to 127.0.0.., port .*: AuthenticationError"):
            start(reference)

    def test_workers_do_not_outlive_a_parent_that_is_killed(self, nodes, reference, tmp_path):
        path = tmp_path / "serve.py"
        path.write_text(SCRIPT.format(model=reference.path, options=OPTIONS))
        with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as script:
            workers = [int(pid) for pid in script.stdout.readline().split()]
            assert len(workers) == 2 and all(map(is_alive, workers))
            script.kill()
        assert_gone(workers)


SCRIPT = """
from nanopd import Cluster, SamplingParams

with Cluster({model!r}, "C:cpu C:cpu", "collocated", executor="ray", **{options!r}) as cluster:
    print(*[status.pid for status in cluster.status().values()], flush=True)
    while True:
        cluster.generate({{"prompt_token_ids": [1, 2, 3]}}, SamplingParams(temperature=0, max_tokens=50), use_tqdm=False)
"""


def assert_serves_mix(cluster, reference):
    assert_tokens_equal_reference(serve_mix(cluster), MIX, reference)


@pytest.fixture(scope="class")
def cluster(nodes, reference, load):
    """Of two workers of each role. What becomes of them is left to the tests of a class, one after the other."""
    with start(reference, checksums=True) as cluster:
        workers = pids(cluster)
        assert_serves(cluster, load)
        yield cluster
    assert_gone(workers)


@needs_ray
@pytest.mark.nightly
class TestKilledWorkers:
    def test_p_is_killed_before_its_transfers(self, cluster, load):
        faults.lose_before_its_transfers(cluster, load, "P0", DIED)

    def test_d_is_killed_while_it_decodes(self, cluster, load):
        faults.lose_amid_decode(cluster, load, "D0", DIED)

    def test_all_are_killed(self, cluster, load):
        faults.lose_all(cluster, load, DIED)


@needs_ray
@pytest.mark.nightly
class TestOtherLostWorkers:
    def test_one_that_hangs_is_given_up(self, cluster, load, monkeypatch):
        hanging = cluster.status()["D1"].pid
        faults.lose_by_hanging(cluster, load, "D1", monkeypatch)
        assert_gone([hanging])  # Ray kills it, though it does not listen

    def test_one_that_breaks_says_why_and_is_ended(self, cluster, load):
        broken = cluster.status()["P1"].pid
        faults.lose_by_a_bug(cluster, load, "P1")
        assert_gone([broken])
        assert cluster.status().keys() == {"P0", "D0"}
