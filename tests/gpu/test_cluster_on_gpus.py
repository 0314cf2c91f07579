"""Clusters of processes on GPUs: the same tokens over every way, whatever is killed meanwhile, and memory given back."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from functools import cache

import pytest
import torch
from workers.processes import wait_until, what_is_held

from nanopd import LLM, BeamSearchParams, Cluster, SamplingParams
from nanopd.tiny import demo_prompts, recall_prompt
from nanopd.workers import process

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
OPTIONS = dict(executor="process", dtype="float32", checksums=True, num_gpu_blocks_override=2048, max_num_seqs=32)
BEAMS = BeamSearchParams(3, max_tokens=10)
# Shorter and longer than what travels layer by layer, one answer and several, some long enough to be broken off.
PROMPTS = [task.prompt for task in demo_prompts() if task.kind != "story"] + [
    recall_prompt(seed, length, lang).prompt for seed, (length, lang) in enumerate(
        [(300, "en"), (700, "zh"), (1200, "en"), (900, "zh"), (290, "en")])]
PARAMS = [SamplingParams(n=3, temperature=0.8, top_p=0.95, seed=i, max_tokens=12) if i % 3 == 1
          else SamplingParams(temperature=0, max_tokens=60, ignore_eos=True) for i in range(len(PROMPTS))]


@cache
def expected() -> tuple[list, list]:
    """Tokens of each answer, as the engine writes them on the CPU: to PROMPTS, and of beams."""
    with LLM("tiny", device="cpu") as llm:
        return answers(llm)


def answers(client) -> tuple[list, list]:
    outputs = client.generate(PROMPTS, PARAMS, use_tqdm=False)
    beams = client.beam_search(PROMPTS[:3] + PROMPTS[-2:], BEAMS, use_tqdm=False)
    assert [output.error for output in outputs + beams if output.error] == []
    return tuple([[answer.token_ids for answer in output.outputs] for output in asked] for asked in (outputs, beams))


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process, open file, shared memory or memory of a GPU."""
    for device in range(torch.cuda.device_count()):
        torch.ones(1, device=f"cuda:{device}")
    gc.collect()
    torch.cuda.empty_cache()
    held, before = what_is_held(), free_memory()
    yield
    assert what_is_held() == held
    assert wait_until(lambda: all(now - then > -2**26 for now, then in zip(free_memory(), before))), (before, free_memory())


def free_memory() -> list[int]:
    return [torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count())]


def transports(cluster) -> set[str]:
    return {sent.transport for history in cluster.history().values() for sent in history.transfers}


def attempts(cluster) -> int:
    """The most that a request took."""
    return max(len(timeline.jobs) for timeline in cluster._central.timelines.values())


# ----------------------------------------------------------------------------------------------------- equal tokens


@pytest.mark.parametrize("topology, mode, transport, by", [
    ("C:0", "collocated", "auto", set()),
    ("P:0 D:0", "disaggregated", "auto", {"local"}),
    pytest.param("C:0 C:1", "collocated", "auto", set(), marks=two_gpus),
    pytest.param("P:0 D:1", "disaggregated", "peer", {"peer"}, marks=two_gpus),
    pytest.param("P:1 D:0", "disaggregated", "relay", {"relay"}, marks=two_gpus),
    pytest.param("P:0 D:1", "disaggregated", "collective", {"collective"}, marks=two_gpus),
    pytest.param("P:0 D:0 P:1 D:1", "disaggregated", "auto", {"local", "peer"}, marks=two_gpus),
])
def test_tokens_equal_the_cpu_s(topology, mode, transport, by):
    with Cluster("tiny", topology, mode, transport=transport, **OPTIONS) as cluster:
        assert answers(cluster) == expected()
        assert transports(cluster) == by
        assert attempts(cluster) == 1, "something had to be sent again"


@two_gpus
def test_recall_in_bf16():
    tasks = [recall_prompt(900 + seed, length, lang) for seed in range(7) for length in (256, 1024, 3500) for lang in ("en", "zh")]
    options = OPTIONS | dict(dtype="bfloat16", num_gpu_blocks_override=8192)
    with Cluster("tiny", "P:0 D:1", "disaggregated", **options) as cluster:
        outputs = cluster.generate([task.prompt for task in tasks], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        right = sum(output.outputs[0].text == task.answer for output, task in zip(outputs, tasks, strict=True))
        assert right >= 0.95 * len(tasks)
        assert attempts(cluster) == 1


# ----------------------------------------------------------------------------------------------------------- faults


class Run:
    """All PROMPTS at once in a cluster of which something is going to be lost."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.pids = {worker_id: status.pid for worker_id, status in cluster.status().items()}
        self.streams = [cluster.submit(prompt, params) for prompt, params in zip(PROMPTS, PARAMS)]
        self.drawn: dict[str, int] = {stream.request_id: 0 for stream in self.streams}

    def step_until(self, condition, timeout=60.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, [self.marks(stream) for stream in self.streams if not stream.finished]
            for event in self.cluster.step():
                self.drawn[event.request_id] += event.token_id is not None

    def marks(self, stream) -> list[str]:
        return [what for what, _ in self.cluster.timeline(stream.request_id).marks]

    def anybody(self, mark: str) -> bool:
        return any(mark in self.marks(stream) for stream in self.streams)

    def signal(self, worker_id: str, number=signal.SIGKILL) -> None:
        os.kill(self.pids[worker_id], number)

    def end(self) -> list[str]:
        """Every request ends, its stream without a gap or a repeat: with the whole answer, or with an error. Returns
        those errors."""
        self.step_until(lambda: all(stream.finished for stream in self.streams))
        errors = []
        for stream, whole in zip(self.streams, expected()[0], strict=True):
            output = stream.result()
            written = [[] for _ in whole]
            for event in stream:
                written[event.index] += [event.token_id] if event.token_id is not None else []
            if output.error is None:
                assert written == whole
            else:
                errors.append(output.error)
                assert written == [answer[: len(tokens)] for answer, tokens in zip(whole, written)]
            assert [answer.token_ids for answer in output.outputs] == written
        return errors


def start(topology: str, transport: str = "auto", **options) -> Cluster:
    return Cluster("tiny", topology, "disaggregated", transport=transport, **OPTIONS, **options)


@two_gpus
def test_p_is_killed_before_a_transfer():
    with start("P:0 D:1 P:1") as cluster:
        run = Run(cluster)
        run.step_until(lambda: run.anybody("sent to P0"))
        run.signal("P0")
        assert run.end() == []
        assert "P0" not in cluster.status() and attempts(cluster) == 2


@two_gpus
def test_p_is_killed_during_a_transfer():
    """The receiver is stopped, so that what is on its way does not arrive before the sender is gone."""
    with start("P:0 D:1 P:1", "relay") as cluster:
        run = Run(cluster)
        run.step_until(lambda: run.anybody("sent to P0"))
        run.signal("D0", signal.SIGSTOP)
        paused = time.monotonic() + 0.5
        run.step_until(lambda: time.monotonic() > paused)
        run.signal("P0")
        run.signal("D0", signal.SIGCONT)
        assert run.end() == []
        assert attempts(cluster) == 2


@two_gpus
def test_p_is_killed_after_its_transfers():
    with start("P:0 D:1") as cluster:
        run = Run(cluster)
        run.step_until(lambda: all("KV transferred" in run.marks(stream) for stream in run.streams))
        run.signal("P0")
        assert run.end() == []
        assert attempts(cluster) == 1


@two_gpus
@pytest.mark.parametrize("transport", ["peer", "relay", "collective"])
def test_d_is_killed_while_it_decodes(transport):
    with start("P:0 D:0 D:1", transport) as cluster:
        run = Run(cluster)
        run.step_until(lambda: any(cluster.timeline(stream.request_id).path[-1:] == ["D1"] and not stream.finished
                                   and run.drawn[stream.request_id] > 5 for stream in run.streams))
        run.signal("D1")
        assert run.end() == []
        assert "D1" not in cluster.status() and attempts(cluster) == 2


@two_gpus
def test_all_are_killed():
    with start("P:0 D:0 P:1 D:1") as cluster:
        run = Run(cluster)
        run.step_until(lambda: sum(run.drawn.values()) > 40)
        for pid in set(run.pids.values()):
            os.kill(pid, signal.SIGKILL)
        errors = run.end()
        assert errors and all("worker is left" in error and "killed by SIGKILL" in error for error in errors)
        assert cluster.status() == {}


@two_gpus
def test_one_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(process, "PING_AFTER", 0.5)
    with start("P:0 D:0 D:1", hang_timeout=2.0) as cluster:
        run = Run(cluster)
        run.step_until(lambda: run.anybody("sent to D1"))
        run.signal("D1", signal.SIGSTOP)
        assert run.end() == []
        assert run.anybody("D1 was lost (did not answer for 2 s)") and "D1" not in cluster.status()


@two_gpus
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_moment(seed):
    """One GPU's process, or both, after some number of tokens."""
    draw = random.Random(seed)
    total = sum(len(tokens) for answer in expected()[0] for tokens in answer)
    with start("P:0 D:0 P:1 D:1", ("auto", "relay", "collective")[seed % 3]) as cluster:
        run = Run(cluster)
        pids = sorted(set(run.pids.values()))
        victims = draw.sample(pids, 1 + (draw.random() < 0.3))
        for moment, pid in zip(sorted(draw.randrange(total // 2) for _ in victims), victims):
            run.step_until(lambda moment=moment: sum(run.drawn.values()) >= moment)
            os.kill(pid, signal.SIGKILL)
        errors = run.end()
        assert all("killed by SIGKILL" in error for error in errors)
        assert errors == [] or len(victims) == len(pids), "somebody was left to answer"
