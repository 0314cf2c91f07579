"""Processes that are killed, hang or break: their workers are lost, once, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from workers.processes import children, is_alive, wait_until, what_is_held
from workers.serving import OPTIONS, greedy, prompt

from nanopd.core import FinishReason, Request, TokenEvent
from nanopd.engine.factory import EngineOptions
from nanopd.messages import AskStatus, Lost, Resume, Serve, Tokens
from nanopd.models.loader import load_spec
from nanopd.workers import process
from nanopd.workers.host import HostSpec, _raise_if_broken
from nanopd.workers.process import ProcessExecutor

HANG_TIMEOUT = 1.0


@pytest.fixture(scope="module")
def executor(reference):
    """One worker for each test to lose, and C9 for those that need one that lives."""
    roles = {"P0": "P", "D0": "D", "C1": "C", "C9": "C"}
    before = what_is_held()
    executor = ProcessExecutor([
        HostSpec(number, {worker_id: role}, "cpu", reference.path, load_spec(reference.path), None, "auto", 0,
                 EngineOptions(**OPTIONS), "auto", False)
        for number, (worker_id, role) in enumerate(roles.items())], HANG_TIMEOUT)
    yield executor
    executor.close()
    assert what_is_held() == before


def poll_for(executor, seconds):
    deadline = time.monotonic() + seconds
    messages = []
    while (left := deadline - time.monotonic()) > 0:
        messages += executor.poll(left)
    return messages


def lost(executor, worker_id, timeout=90):
    """Poll until it is lost. What it was lost for, and what it said before; both as poll returned them."""
    said, deadline = [], time.monotonic() + timeout
    while time.monotonic() < deadline:
        for speaker, message in executor.poll(0.5):
            if speaker == worker_id:
                said.append(message)
        if said and isinstance(said[-1], Lost):
            return said.pop().reason, said
    raise AssertionError(f"{worker_id} was not lost within {timeout} s; it said {said}")


def assert_gone(executor, worker_id, pid):
    """Reaped before anybody was told, told once, and forgotten."""
    assert pid not in children()
    assert worker_id not in executor.roles
    executor.send(worker_id, AskStatus())
    assert poll_for(executor, 0.2) == []
    assert worker_id not in executor.status()


@pytest.mark.parametrize("worker_id", ["P0", "D0"])
def test_killed(executor, worker_id):
    pid = executor.status()[worker_id].pid
    os.kill(pid, signal.SIGKILL)
    assert lost(executor, worker_id) == ("killed by SIGKILL", [])
    assert_gone(executor, worker_id, pid)
    assert executor.status()["C9"].role == "C"


def test_a_host_that_hangs_is_given_up(executor, monkeypatch):
    monkeypatch.setattr(process, "PING_AFTER", 0.2)
    pid = executor.status()["C1"].pid
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    for _ in range(100):
        executor.send("C1", Serve(Request("big", [1] * 50_000)))  # its full pipe would hold us up for ever
    assert lost(executor, "C1") == ("did not answer for 1 s", [])
    assert time.monotonic() - start > HANG_TIMEOUT
    assert_gone(executor, "C1", pid)


def test_a_parent_that_was_away_for_long_gives_nobody_up(executor, monkeypatch):
    monkeypatch.setattr(process, "PING_AFTER", 0.2)
    executor.status()
    time.sleep(0.3)
    assert executor.poll(0) == []  # asks for a sign of life
    time.sleep(1.2 * HANG_TIMEOUT)
    assert poll_for(executor, 1.2 * HANG_TIMEOUT) == [] and "C9" in executor.roles


def test_a_worker_that_breaks_says_why(executor):
    """The last of the tests that need C9."""
    pid = executor.status()["C9"].pid
    executor.send("C9", Serve(Request("0", list(prompt(9)), greedy(4))))
    said = []
    assert wait_until(lambda: said.extend(executor.poll(0.1)) or (said and said[-1][1].events[-1].finish_reason))
    assert said[-1][1].events[-1].finish_reason is FinishReason.LENGTH
    executor.send("C9", Resume("1", lease_id=77, written=[]))
    assert lost(executor, "C9") == ("KeyError: 77", [])
    assert pid not in children() and "C9" not in executor.roles


def test_an_executor_without_workers_waits_all_the_same(executor):
    """Nothing spins, also when all are gone."""
    for pid in [status.pid for status in executor.status().values()]:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: executor.poll(0.1) is not None and not executor.roles)
    assert executor.status() == {}
    start, used = time.monotonic(), time.process_time()
    assert executor.poll(0.5) == []
    assert time.monotonic() - start >= 0.5
    assert time.process_time() - used < 0.05


@pytest.mark.parametrize("error, is_broken", [
    ("AcceleratorError: CUDA error: an illegal memory access was encountered", True),
    ("RuntimeError: CUDA error: unspecified launch failure", True),
    ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", False),
    ("no token is possible after this prompt", False), (None, False),
])
def test_a_broken_device_is_not_its_requests_fault(error, is_broken):
    messages = [Tokens([TokenEvent("0", 0, 5)]), Tokens([TokenEvent("1", 0, finish_reason=FinishReason.ERROR, error=error)])]
    if is_broken:
        with pytest.raises(RuntimeError, match="CUDA error"):
            _raise_if_broken(messages)
    else:
        _raise_if_broken(messages)


# -------------------------------------------------------------------------------------------------- scripts

SCRIPT = """
from nanopd import Cluster, SamplingParams

with Cluster({model!r}, "C:cpu", "collocated", executor="process", **{options!r}) as cluster:
    print(*[status.pid for status in cluster.status().values()], flush=True)
    while True:
        cluster.generate({{"prompt_token_ids": [1, 2, 3]}}, SamplingParams(temperature=0, max_tokens=50), use_tqdm=False)
"""


@pytest.fixture(scope="module")
def scripts(reference, tmp_path_factory):
    """Two that serve for ever, as (process, its worker's process id). Neither has an `if __name__ == "__main__"`."""
    path = tmp_path_factory.mktemp("script") / "serve.py"
    path.write_text(SCRIPT.format(model=reference.path, options=OPTIONS))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running = [subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env=environment, start_new_session=True) for _ in range(2)]
    yield [(script, int(script.stdout.readline())) for script in running]
    for script in running:
        script.kill()
        script.communicate()


def test_ctrl_c_ends_a_script_and_its_workers(scripts):
    script, worker = scripts[0]
    assert is_alive(worker)
    os.killpg(script.pid, signal.SIGINT)  # as the terminal does: all of its group
    _, errors = script.communicate(timeout=90)
    assert script.returncode == -signal.SIGINT
    assert errors.count("KeyboardInterrupt") == 1 and "Error" not in errors  # the worker has nothing to say to it
    assert not is_alive(worker)


def test_workers_do_not_outlive_a_parent_that_is_killed(scripts):
    script, worker = scripts[1]
    assert is_alive(worker)
    script.kill()
    script.wait()
    assert wait_until(lambda: not is_alive(worker))
