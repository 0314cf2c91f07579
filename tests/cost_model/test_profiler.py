"""The profiler on real clusters of a very small model. Its times are the machine's, so no test asks how long anything took."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time

import pytest
import torch
from checkpoints import make_checkpoint

from nanopd.cluster import Cluster
from nanopd.core import SamplingParams
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.profile import Profile
from nanopd.cost_model.profiler import profile_cluster, sizes

OPTIONS = dict(num_gpu_blocks_override=512, block_size=4, max_num_seqs=6, max_num_batched_tokens=64, max_model_len=256)
EVERY_ROLE = "C:cpu P:cpu D:cpu"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("profiled")
    make_checkpoint(path, "qwen3", layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, vocab=64, max_position=256)
    return str(path)


@pytest.fixture
def open_cluster(model):
    def opened(topology=EVERY_ROLE, mode="collocated", **options):
        return Cluster(model, topology, mode, **{**OPTIONS, **options})
    return opened


@pytest.fixture(scope="module")
def processes(model):
    """A cluster of three processes, for several tests: each leaves it as it was."""
    with Cluster(model, EVERY_ROLE, "collocated", executor="process", **OPTIONS) as cluster:
        yield cluster


@pytest.fixture(params=["inline", "process"])
def cluster(request):
    """One in this process, and one in several."""
    if request.param == "process":
        yield request.getfixturevalue("processes")
    else:
        with request.getfixturevalue("open_cluster")() as cluster:
            yield cluster


def assert_usable_and_empty(cluster):
    """Nothing is left on any worker, all have their roles, and requests are served as ever."""
    assert not cluster.has_work
    for worker_id, status in cluster.status().items():
        assert status.num_free_blocks == status.num_blocks, worker_id
        assert not (status.num_waiting or status.num_running or status.num_leases or status.num_transfers), worker_id
    stream = cluster.submit({"prompt_token_ids": [1, 2, 3]}, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert len(stream.result().outputs[0].token_ids) == 3
    assert cluster.timeline(stream.request_id).path == ({"collocated": ["C0"], "disaggregated": ["P0", "D0"]}[cluster.mode])


def test_every_quantity_is_measured(cluster):
    said = []
    profile = profile_cluster(cluster, lambda text, share: said.append((text, share)), seconds=4)
    assert_usable_and_empty(cluster)
    assert (profile.model, profile.dtype, profile.device) == (cluster.model, "float32", cluster.device_name)
    transport = {"inline": "local", "process": "peer"}[cluster.executor]
    rows = profile.measurements
    assert {row.new_tokens for row in rows.prefill} >= {16, 24, 32, 48}
    assert all(row.new_tokens <= OPTIONS["max_num_batched_tokens"] for row in (*rows.prefill, *rows.mixed))
    assert {row.decodes for row in rows.decode} >= {1, 2, 3}
    means = [row.context_tokens / row.decodes for row in rows.decode]
    assert max(means) > 1.5 * min(means)  # several contexts
    assert len({row.decodes for row in rows.mixed}) > 1 and {row.new_tokens for row in rows.mixed} >= {32}
    assert {(row.source, row.destination, row.transport) for row in rows.transfer} == {("cpu", "cpu", transport)}
    block = cluster.spec.kv_bytes_per_token(4) * 4
    assert {row.num_bytes for row in rows.transfer} == {block // 2, block, 4 * block, 16 * block, 64 * block}  # and one layer
    assert len(rows.messages) >= len(rows.prefill) and profile.cost.message_seconds > 0
    assert profile.cost.shape.kv_bytes_per_token == cluster.spec.kv_bytes_per_token(4)
    assert {fit.quantity.split()[0] for fit in profile.fits} == {"prefill", "decode", "mixed", "transfer"}
    assert all(math.isfinite(error) for fit in profile.fits for error in (*fit.errors, *fit.held_out_errors))
    assert Profile.from_json(profile.to_json()) == profile
    shares = [share for _, share in said]
    assert shares == sorted(shares) and 0 <= shares[0] and shares[-1] <= 1
    assert {text.split()[0] for text, _ in said} >= {"a", "1", "the", "fitting"}


def test_two_collocated_workers_can_be_a_pair_and_have_a_link(open_cluster):
    with open_cluster("C:cpu C:cpu") as cluster:
        profile = profile_cluster(cluster, seconds=1)
        assert_usable_and_empty(cluster)
    assert {(row.source, row.destination) for row in profile.measurements.transfer} == {("cpu", "cpu")}
    assert any("links: sends" in note for note in profile.notes)


def test_a_collocated_worker_alone_has_no_links(open_cluster):
    with open_cluster("C:cpu") as cluster:
        profile = profile_cluster(cluster, seconds=1)
        assert all(not history.steps for worker_id, history in cluster.history().items() if worker_id != "C0")
    assert not profile.measurements.transfer and any("links: none, for there are no two" in note for note in profile.notes)
    with pytest.raises(CostModelError, match="no transfers were measured"):
        profile.cost.transfer("cpu", "cpu")


def test_without_a_collocated_worker_the_decoding_one_does_all(open_cluster):
    with open_cluster("P:cpu D:cpu D:cpu", "disaggregated") as cluster:
        profile = profile_cluster(cluster, seconds=1)
        assert {worker_id for worker_id, history in cluster.history().items() if history.steps} == {"D0"}
        assert_usable_and_empty(cluster)
    assert profile.measurements.mixed and profile.measurements.transfer


def test_no_two_prompts_share_a_block_and_none_is_served_from_a_cache(open_cluster, monkeypatch):
    prompts, submit = [], Cluster.submit

    def spy(self, prompt, *args, **options):
        prompts.append(tuple(prompt["prompt_token_ids"]))
        return submit(self, prompt, *args, **options)

    monkeypatch.setattr(Cluster, "submit", spy)
    with open_cluster() as cluster:
        profile_cluster(cluster, seconds=1)
        first = {row.request_id: row.num_cached for step in reversed(cluster.history()["C0"].steps) for row in step.rows}
    assert len(prompts) > 30 and len({prompt[:8] for prompt in prompts}) == len(prompts)
    assert set(first.values()) == {0}


def test_nor_from_what_an_earlier_profile_left_there(open_cluster):
    with open_cluster() as cluster:
        profile_cluster(cluster, seconds=0.5)
        begin = time.monotonic()
        profile_cluster(cluster, seconds=0.5)
        first = {row.request_id: row.num_cached for step in reversed(cluster.history(begin)["C0"].steps) for row in step.rows}
    assert set(first.values()) == {0}


def test_a_cluster_that_takes_few_requests_can_be_profiled(open_cluster):
    with open_cluster(max_queued=3) as cluster:
        profile = profile_cluster(cluster, seconds=1)
        assert_usable_and_empty(cluster)
    assert max(row.decodes for row in profile.measurements.decode) <= 3


def test_a_cluster_that_is_at_work_is_left_alone(open_cluster):
    with open_cluster() as cluster:
        stream = cluster.submit({"prompt_token_ids": [1, 2]}, SamplingParams(max_tokens=4, ignore_eos=True))
        with pytest.raises(RuntimeError, match="requests are open"):
            profile_cluster(cluster)
        assert len(stream.result().outputs[0].token_ids) == 4
        assert_usable_and_empty(cluster)


def test_a_little_time_is_kept_to_as_far_as_can_be(open_cluster):
    """What must be known takes well under a second here; ten times that is for a machine that does much else."""
    with open_cluster() as cluster:
        start = time.monotonic()
        profile = profile_cluster(cluster, seconds=0.1)
        assert time.monotonic() - start < 30
    assert profile.measurements.mixed, "what has to be known of steps with prompts and decodes was measured all the same"


def test_where_nothing_arrives_beside_others_that_is_assumed_and_said(open_cluster):
    with open_cluster(max_num_seqs=2) as cluster:
        profile = profile_cluster(cluster, seconds=0.5)
    assert not profile.measurements.mixed and any("assumed" in note for note in profile.notes)


@pytest.mark.parametrize("moment", ["a prompt", "2 sequences", "the link", "fitting"])
def test_ctrl_c_leaves_the_cluster_usable_and_nothing_behind(cluster, moment):
    def interrupt(text, share):
        if text.startswith(moment):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_cluster(cluster, interrupt, seconds=0.5)
    assert_usable_and_empty(cluster)


@pytest.mark.parametrize("after", [0.1, 0.23, 0.41])
def test_ctrl_c_may_come_at_any_time(cluster, after, monkeypatch):
    """Inline, while a step runs: an interrupt within the few lines that plan it is not safe yet."""
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    if cluster.executor == "inline":
        runner, calls = cluster.workers["C0"].engine.runner, itertools.count()
        execute = runner.execute

        def interrupted(*args):
            if next(calls) == int(100 * after):
                signal.raise_signal(signal.SIGINT)
            return execute(*args)

        monkeypatch.setattr(runner, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        if cluster.executor == "process":
            timer.start()
        while True:
            profile_cluster(cluster, seconds=2)
    assert_usable_and_empty(cluster)


def test_a_request_that_fails_ends_the_profile_and_is_told(open_cluster, monkeypatch):
    with open_cluster() as cluster:
        runner = cluster.workers["C0"].engine.runner

        def fail(*args):
            raise RuntimeError("the device is on fire")

        monkeypatch.setattr(runner, "execute", fail)
        with pytest.raises(RuntimeError, match="failed: RuntimeError: the device is on fire"):
            profile_cluster(cluster, seconds=1)
        monkeypatch.undo()
        assert_usable_and_empty(cluster)


def test_sizes_are_powers_of_two_the_middles_between_and_the_most():
    assert sizes(16, 100) == [16, 24, 32, 48, 64, 96, 100]
    assert sizes(1, 6) == [1, 2, 3, 4, 6]
    assert sizes(1, 1) == [1]
    assert sizes(16, 9) == [9]
