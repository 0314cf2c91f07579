"""Workers in processes: they start, answer as the inline ones do, rest when there is nothing to do, and go."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from workers.faults import assert_idle
from workers.processes import children, cpu_seconds, is_alive, wait_until, what_is_held
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

from nanopd import Cluster, ConfigError, ModelError
from nanopd.core import Request
from nanopd.engine.factory import EngineOptions
from nanopd.messages import AskHistory, Cancel, ReleaseLease, Reserve, Serve
from nanopd.models.loader import load_spec
from nanopd.workers.host import HostSpec
from nanopd.workers.process import ProcessExecutor

TOPOLOGIES = {"disaggregated": "P:cpu D:cpu P:cpu D:cpu", "collocated": "C:cpu C:cpu"}


@pytest.fixture(scope="module", params=TOPOLOGIES)
def cluster(request, reference):
    """A cluster of processes in each mode. Its status shows what a test leaves in it."""
    with reference.cluster(request.param, TOPOLOGIES[request.param], executor="process") as cluster:
        yield cluster
        assert_idle(cluster)


@pytest.fixture
def pipeline(cluster):
    """The disaggregated one alone, where the mode makes no difference."""
    if cluster.mode != "disaggregated":
        pytest.skip("once is enough")
    return cluster


def spec(reference, model=None):
    return HostSpec(host=0, roles={"C0": "C"}, device="cpu", model=model or reference.path, shape=load_spec(reference.path),
                    dtype=None, load_format="auto", seed=0, options=EngineOptions(**OPTIONS), transport="auto", checksums=False)


@contextmanager
def ctrl_c_after(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_tokens_are_those_of_the_dense_model_and_of_the_inline_executor(cluster, reference):
    outputs = serve_mix(cluster, MIX * 2)
    assert_tokens_equal_reference(outputs, MIX * 2, reference)
    with reference.cluster(cluster.mode) as inline:
        theirs = serve_mix(inline, MIX * 2)
    assert [[answer.token_ids for answer in output.outputs] for output in outputs] == [
        [answer.token_ids for answer in output.outputs] for output in theirs]
    assert_idle(cluster)


def test_every_worker_has_a_process_and_a_part_in_the_work(cluster):
    serve_mix(cluster, MIX * 2)
    status = cluster.status()
    assert list(status) == list(cluster.topology.workers) == list(cluster._executor.roles)
    assert all(status[worker_id].role == worker_id[0] for worker_id in status)
    assert {worker.pid for worker in status.values()} <= set(children())
    assert len({worker.pid for worker in status.values()}) == len(status)
    history = cluster.history()
    assert all(history[worker_id].steps for worker_id in history)
    sent = {worker_id: {transfer.destination for transfer in history[worker_id].transfers} for worker_id in history}
    assert sent == {worker_id: {"D0", "D1"} if worker_id[0] == "P" else set() for worker_id in history}


def test_workers_take_the_models_shape_from_their_parent(cluster):
    """To read it they would have to import transformers, which takes them as long as torch. It brings PyYAML along."""
    load_spec(cluster.model)
    pids = [os.getpid(), *(status.pid for status in cluster.status().values())]
    assert [pid for pid in pids if "_yaml" in Path(f"/proc/{pid}/maps").read_text()] == [os.getpid()]


def test_steps_are_told_by_a_clock_that_all_share(pipeline):
    start = time.monotonic()
    serve_mix(pipeline, [(prompt(9), greedy())])
    end = time.monotonic()
    latest = [record.steps[-1].start for record in pipeline.history().values()]
    assert sum(start < moment < end for moment in latest) == 2  # one P and one D had something to do
    lately = pipeline.history(start)
    assert sum(bool(history.steps) for history in lately.values()) == 2
    assert sum(len(history.transfers) for history in lately.values()) == 1
    assert not any(history.steps or history.transfers for history in pipeline.history(end).values())


def test_an_idle_cluster_rests(cluster):
    serve_mix(cluster, MIX)
    assert_idle(cluster)
    pids = [status.pid for status in cluster.status().values()]
    before, seconds = sum(map(cpu_seconds, pids)), 2.0
    time.sleep(seconds)
    assert sum(map(cpu_seconds, pids)) - before < 0.02 * seconds


def test_waiting_for_an_answer_costs_the_parent_nothing(pipeline):
    before = time.process_time()
    assert pipeline._executor.poll(timeout=1.0) == []
    assert time.process_time() - before < 0.02


def test_a_worker_that_waits_for_blocks_does_not_spin(pipeline):
    """Leases hold all of them: there is work, and nothing that could be done."""
    executor, pid = pipeline._executor, pipeline.status()["D0"].pid
    for number in range(3):
        executor.send("D0", Reserve(Request(f"lease{number}", list(prompt(62, 5 * number)))))
    leases = []
    while len(leases) < 3:
        leases += [message.destination.lease_id for _, message in executor.poll(1)]
    executor.send("D0", Serve(Request("waits", list(prompt(9)), greedy(4))))
    assert wait_until(lambda: pipeline.status()["D0"].num_waiting == 1)
    before = cpu_seconds(pid)
    assert executor.poll(1.0) == []
    assert cpu_seconds(pid) - before < 0.25
    for lease_id in leases:
        executor.send("D0", ReleaseLease(lease_id, "request"))
        executor.send("D0", ReleaseLease(lease_id, "writer"))
    drawn = []
    while len(drawn) < 4:
        drawn += [message.events[0].token_id for _, message in executor.poll(1)]
    assert_idle(pipeline)


def test_floods_both_ways_do_not_stop_each_other(pipeline, reference):
    """More than a pipe holds, while nobody reads at this end."""
    for worker_id in pipeline._executor.roles:
        for _ in range(300):
            pipeline._executor.send(worker_id, AskHistory())
            pipeline._executor.send(worker_id, Cancel("x" * 50_000))
    outputs = serve_mix(pipeline)
    assert_tokens_equal_reference(outputs, MIX, reference)
    assert_idle(pipeline)


def test_ctrl_c_leaves_a_cluster_that_goes_on(cluster, reference):
    """As in a notebook, at many moments: the interrupted requests are gone, and later ones are answered."""
    endless = [(prompt(9, start), sampled(3, max_tokens=9, seed=start)) for start in range(40)]
    for moment in range(25):
        with pytest.raises(KeyboardInterrupt), ctrl_c_after(0.005 + 0.004 * moment):
            while True:
                serve_mix(cluster, endless)
        assert not cluster.has_work
    assert_tokens_equal_reference(serve_mix(cluster), MIX, reference)
    assert_idle(cluster)


def test_a_stream_goes_on_after_ctrl_c(cluster, reference):
    """Without a gap: what was interrupted is the waiting, not the request."""
    sampling = sampled(1, max_tokens=50)
    stream = cluster.submit(ids(prompt(9))[0], sampling)
    for moment in range(5):
        with pytest.raises(KeyboardInterrupt), ctrl_c_after(0.002 * moment):
            while True:
                cluster.step()
    assert [event.token_id for event in stream] == reference.answer(prompt(9), sampling)[0]


def test_leaving_a_stream_early_cancels_on_the_workers(cluster):
    for _ in cluster.stream(ids(prompt(9))[0], greedy(50)):
        break
    assert_idle(cluster)


# ------------------------------------------------------------------------------------------- start and stop


def new_children(before):
    return sorted(set(children()) - set(before[0]))


def test_what_kept_a_host_from_starting_is_said_in_its_own_words(reference, capfd):
    before = what_is_held()
    with pytest.raises(ModelError, match="no-such-model"):
        ProcessExecutor([spec(reference, "./no-such-model"), spec(reference)])
    assert what_is_held() == before
    with pytest.raises(ConfigError, match="no room for a KV cache of 1000000000000 blocks"):
        Cluster(reference.path, "C:cpu", "collocated", executor="process", num_gpu_blocks_override=10**12)
    assert what_is_held() == before
    assert "Traceback" not in capfd.readouterr().err


def test_a_host_killed_while_it_starts(reference):
    before = what_is_held()

    def kill():
        assert wait_until(lambda: new_children(before))
        os.kill(new_children(before)[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match="C0 on cpu did not start: killed by SIGKILL"):
        ProcessExecutor([spec(reference)])
    killer.join()
    assert what_is_held() == before


def test_ctrl_c_while_it_starts(reference):
    before = what_is_held()
    with pytest.raises(KeyboardInterrupt), ctrl_c_after(0.5):
        ProcessExecutor([spec(reference)])
    assert what_is_held() == before


def test_a_model_that_is_not_there_starts_nothing():
    before = what_is_held()
    with pytest.raises(ModelError, match="no-such-model"):
        Cluster("./no-such-model", "C:cpu", "collocated", executor="process")
    assert what_is_held() == before


def test_time_and_again_nothing_is_left(reference):
    Cluster(reference.path, "C:cpu", "collocated", **OPTIONS).shutdown()  # what is opened once and kept is open now
    gc.collect()
    before = what_is_held()
    expected = None
    for turn in range(3):
        cluster = reference.cluster("collocated", "C:cpu", executor="process")
        (output,) = serve_mix(cluster, [(prompt(9), greedy())])
        expected = expected or output.outputs[0].token_ids
        assert output.outputs[0].token_ids == expected
        (pid,) = new_children(before)
        if turn == 2:  # forgotten rather than shut down
            del cluster
            gc.collect()
        else:
            cluster.shutdown()
            cluster.shutdown()
            with pytest.raises(RuntimeError, match="shut down"):
                serve_mix(cluster)
        assert not is_alive(pid)
        assert what_is_held() == before


@pytest.mark.parametrize("options, message", [
    (dict(executor="fax"), "unknown executor 'fax'; there are inline, process, ray"),
    (dict(transport="peer", executor="ray"), "needs memory that both sides can map"),
    (dict(transport="pigeon"), "unknown transport 'pigeon'; there are auto, peer"),
    (dict(transport="peer", executor="inline"), "goes between processes"),
    (dict(hang_timeout=0), "hang_timeout must be"),
])
def test_settings_that_can_not_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Cluster("tiny", "P:cpu D:cpu", **options)
