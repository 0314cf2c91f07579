"""Clusters of processes on GPUs: the same tokens over every way, whatever goes wrong meanwhile, and memory given back.

A cluster takes seconds to start. So one serves several tests, in the order in which they stand here: those that all of
its workers survive come first, and the one after which nobody is left comes last.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from workers import faults
from workers.faults import FaultsThatAllSurvive, Load, Mishaps, Run, assert_idle, random_events
from workers.processes import is_alive, wait_until, what_is_held

from nanopd import LLM, BeamSearchParams, Cluster, SamplingParams
from nanopd.tiny import demo_prompts, recall_prompt

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
OPTIONS = dict(executor="process", dtype="float32", checksums=True, num_gpu_blocks_override=1024, max_num_seqs=16,
               max_num_batched_tokens=512, prefill_chunk_size=256)
# Shorter and longer than what travels layer by layer, in one chunk and in several; one answer and several.
PROMPTS = [task.prompt for task in demo_prompts() if task.kind != "story"][::2] + [
    recall_prompt(seed, length, lang).prompt for seed, (length, lang) in enumerate([(300, "en"), (700, "zh"), (1200, "en")])]
PARAMS = [SamplingParams(n=3, temperature=0.8, top_p=0.95, seed=i, max_tokens=12) if i % 3 == 1
          else SamplingParams(temperature=0, max_tokens=40, ignore_eos=True) for i in range(len(PROMPTS))]
BEAM_PROMPTS, BEAMS = [PROMPTS[0], PROMPTS[4]], BeamSearchParams(3, max_tokens=8)


@cache
def expected() -> tuple[Load, list]:
    """As the engine answers on the CPU: PROMPTS, and beams."""
    with LLM("tiny", device="cpu") as llm:
        whole = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        return Load(list(zip(PROMPTS, PARAMS)), [tokens(output) for output in whole]), beams(llm)


def tokens(output) -> list[list[int]]:
    assert output.error is None
    return [answer.token_ids for answer in output.outputs]


def beams(client) -> list:
    return [tokens(output) for output in client.beam_search(BEAM_PROMPTS, BEAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def load() -> Load:
    return expected()[0]


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """What this process loads once and keeps is there before anybody counts."""
    start_and_stop()


def start_and_stop() -> None:
    with Cluster("tiny", "P:0 D:0", "disaggregated", **OPTIONS | dict(executor="inline")) as cluster:
        assert cluster.generate("What is 2+3?", PARAMS[0], use_tqdm=False)[0].error is None


@contextmanager
def leaving_nothing():
    """No process, open file, shared memory or memory of a GPU."""
    for device in range(torch.cuda.device_count()):
        torch.ones(1, device=f"cuda:{device}")
    settle()
    held, before = what_is_held(), free_memory()
    yield
    settle()
    assert what_is_held() == held
    assert wait_until(lambda: all(now - then > -2**26 for now, then in zip(free_memory(), before))), (before, free_memory())


def settle() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def free_memory() -> list[int]:
    return [torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count())]


@contextmanager
def started(topology: str, transport: str = "auto", enforce_eager: bool = True):
    """Without graphs: it starts sooner, and steps take long enough for something to happen in the midst of them."""
    with leaving_nothing():
        with Cluster("tiny", topology, "disaggregated", transport=transport, enforce_eager=enforce_eager, **OPTIONS) as cluster:
            yield cluster


def assert_tokens_equal_the_cpu_s(cluster: Cluster, load: Load, by: set[str]) -> None:
    run = Run(cluster, load)
    assert run.end() == [] and run.attempts == 1
    assert beams(cluster) == expected()[1]
    assert {sent.transport for history in cluster.history().values() for sent in history.transfers} == by
    assert_idle(cluster)


# ------------------------------------------------------------------------------------------------------ one process


def test_both_pipelines_on_one_gpu(load):
    with started("C:0 P:0 D:0", enforce_eager=False) as cluster:
        both = [Run(cluster, load, mode=mode) for mode in ("collocated", "disaggregated")]
        assert [run.end() for run in both] == [[], []]
        assert_tokens_equal_the_cpu_s(cluster, load, {"local"})


def test_started_and_stopped_five_times_in_this_process():
    """As in a notebook. Those with processes of their own are started and stopped by the other tests here."""
    with leaving_nothing():
        for _ in range(5):
            start_and_stop()


# ------------------------------------------------------------------------------------------- written by the sender


@pytest.fixture(scope="module")
def peers():
    with started("P:0 D:1 P:1") as cluster:
        yield cluster


@two_gpus
def test_tokens_over_nvlink(peers, load):
    assert_tokens_equal_the_cpu_s(peers, load, {"peer", "local"})


@two_gpus
class TestFaultsThatAllSurvive(FaultsThatAllSurvive):
    """See there."""

    @pytest.fixture
    def cluster(self, peers):
        return peers


@two_gpus
@pytest.mark.parametrize("seed", range(6))
def test_any_mishaps_at_any_moment(peers, load, seed):
    Mishaps(peers, load).play(random_events(seed, load.num_tokens))


@two_gpus
def test_p_is_killed_amid_a_transfer(peers, load):
    faults.lose_amid_a_transfer(peers, load, "P0")


@two_gpus
def test_all_are_killed(peers, load):
    faults.lose_all(peers, load)


# ------------------------------------------------------------------------------------------ with two ends


@pytest.fixture(scope="module")
def relayed():
    with started("P:0 D:1 P:1", "relay") as cluster:
        yield cluster


@two_gpus
def test_tokens_over_pinned_memory(relayed, load):
    assert_tokens_equal_the_cpu_s(relayed, load, {"relay", "local"})


@two_gpus
def test_p_is_killed_while_the_receiver_does_not_receive(relayed, load):
    faults.lose_with_the_receiver_stopped(relayed, load, "P0")


@pytest.fixture(scope="module")
def collective():
    with started("P:0 D:1 P:1", "collective") as cluster:
        yield cluster


@two_gpus
def test_tokens_over_nccl(collective, load):
    assert_tokens_equal_the_cpu_s(collective, load, {"collective", "local"})


@two_gpus
def test_p_is_killed_before_its_transfers(collective, load):
    faults.lose_before_its_transfers(collective, load, "P0")


@two_gpus
@pytest.mark.parametrize("transport", ["auto", "collective"])
def test_d_is_killed_while_it_decodes(transport, load):
    with started("P:0 D:0 D:1", transport) as cluster:
        faults.lose_amid_decode(cluster, load, "D1")


# ----------------------------------------------------------------------------------------------- other ways to go


@two_gpus
def test_p_is_killed_after_its_transfers(load):
    """The last one: what is asked later is told so."""
    with started("P:0 D:1") as cluster:
        faults.lose_after_its_transfers(cluster, load, "P0")
        error = cluster.generate(PROMPTS[0], PARAMS[0], use_tqdm=False)[0].error
        assert error == "no prefill worker is left: P0 was lost (killed by SIGKILL)"


@two_gpus
def test_one_that_hangs_is_given_up(load, monkeypatch):
    with started("P:0 D:0 D:1", "relay") as cluster:
        faults.lose_by_hanging(cluster, load, "D1", monkeypatch)


@two_gpus
def test_an_illegal_memory_access(load):
    """With graphs, and with steps begun ahead: the whole process is given up, and the other GPU answers."""
    with started("P:0 D:0 P:1 D:1", enforce_eager=False) as cluster:
        assert_tokens_equal_the_cpu_s(cluster, load, {"peer", "local"})
        faults.lose_by_a_bad_token(cluster, load, "D1")


SCRIPT = """
from nanopd import Cluster, SamplingParams

with Cluster("tiny", {topology!r}, "disaggregated", enforce_eager=True, **{options!r}) as cluster:
    print(*{{status.pid for status in cluster.status().values()}}, flush=True)
    while True:
        cluster.generate(["a b c"] * 8, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True), use_tqdm=False)
"""


@two_gpus
def test_workers_do_not_outlive_a_client_that_is_killed(tmp_path):
    path = tmp_path / "serve.py"
    path.write_text(SCRIPT.format(topology="P:0 D:1", options=OPTIONS))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with leaving_nothing():
        with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=environment) as script:
            workers = [int(pid) for pid in script.stdout.readline().split()]
            assert len(workers) == 2 and all(map(is_alive, workers))
            script.kill()
        assert wait_until(lambda: not any(map(is_alive, workers)))


# ---------------------------------------------------------------------------------------------------------- bf16


@two_gpus
def test_recall_in_bf16():
    tasks = [recall_prompt(900 + seed, length, lang) for seed in range(7) for length in (256, 1024, 3500) for lang in ("en", "zh")]
    options = OPTIONS | dict(dtype="bfloat16", num_gpu_blocks_override=8192, max_num_seqs=32)
    with leaving_nothing(), Cluster("tiny", "P:0 D:1", "disaggregated", **options) as cluster:
        outputs = cluster.generate([task.prompt for task in tasks], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        right = sum(output.outputs[0].text == task.answer for output, task in zip(outputs, tasks, strict=True))
        assert right >= 0.95 * len(tasks)
        assert max(len(cluster.timeline(output.request_id).jobs) for output in outputs) == 1
