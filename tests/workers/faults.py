"""What may go wrong in a cluster of processes, and what must come of it: the same on CPUs and on GPUs.

Faults come from outside: by signals, by what goes over the wires, and by memory that processes share.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from torch import Tensor
from workers.processes import children, is_alive, stop, wait_until

from nanopd import Cluster
from nanopd.core import FinishReason, Request
from nanopd.messages import Destination, FromWorker, Granted, Prefill, Prefilled, Reserve, Resume, ToWorker
from nanopd.router.entry import Stage
from nanopd.workers import process
from nanopd.workers.memory import HostMemory, MappedDeviceMemory

BROKEN_OFF = (FinishReason.ABORT, FinishReason.ERROR)
CORRUPTED = "was not what was sent (checksum)"
NO_NUMBER = "no number"  # as a seed: the step that draws with it raises
STEP_ERROR = "TypeError: unsupported operand"
KILLED = "killed by SIGKILL"  # as a process's parent sees it


@dataclass(frozen=True)
class Load:
    """Requests (prompt, parameters), and the tokens of each of their answers where nothing goes wrong."""

    asked: list[tuple]
    whole: list[list[list[int]]]

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for answer in self.whole for tokens in answer)


class Run:
    """All requests of a load at once, in a cluster where something goes wrong."""

    def __init__(self, cluster: Cluster, load: Load, **options) -> None:
        self.cluster = cluster
        self.load = load
        self.pids = {worker_id: status.pid for worker_id, status in cluster.status().items()}
        self.streams = [cluster.submit(prompt, sampling, **options) for prompt, sampling in load.asked]
        self.num_drawn = {stream.request_id: 0 for stream in self.streams}

    @property
    def total(self) -> int:
        return sum(self.num_drawn.values())

    @property
    def is_over(self) -> bool:
        return all(stream.finished for stream in self.streams)

    def step(self) -> None:
        for event in self.cluster.step():
            if event.request_id in self.num_drawn:
                self.num_drawn[event.request_id] += event.token_id is not None

    def step_until(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, [self.marks(stream) for stream in self.streams if not stream.finished]
            assert not self.is_over, "all was over before it came to that"
            self.step()

    def marks(self, stream) -> list[str]:
        return [what for what, _ in self.cluster.timeline(stream.request_id).marks]

    def anybody(self, mark: str) -> bool:
        return any(mark in self.marks(stream) for stream in self.streams)

    @property
    def attempts(self) -> int:
        """The most that a request took."""
        return max(len(self.cluster.timeline(stream.request_id).jobs) for stream in self.streams)

    def entry(self, stream):
        return self.cluster._central._entries.get(stream.request_id)

    def stage(self, request_id: str) -> Stage | None:
        """None: it has ended."""
        entry = self.cluster._central._entries.get(request_id)
        return entry and entry.stage

    def at(self, stage: Stage, num_drawn: int = 0):
        """A request that has come so far; None if there is none just now."""
        return next((stream for stream in self.streams if (entry := self.entry(stream)) is not None
                     and entry.stage is stage and self.num_drawn[stream.request_id] >= num_drawn), None)

    def signal(self, worker_id: str, number: int = signal.SIGKILL) -> None:
        """To the worker's process, and so to all workers in it."""
        os.kill(self.pids[worker_id], number)

    def end(self) -> list[str]:
        """Run until every request has ended, each stream without a gap or a repeat: whole, or broken off by a cancel or
        with an error. Returns those errors."""
        if not self.is_over:
            self.step_until(lambda: self.is_over)
        errors = []
        for stream, whole in zip(self.streams, self.load.whole, strict=True):
            output, events = stream.result(), list(stream)
            written = [[event.token_id for event in events if event.index == i and event.token_id is not None]
                       for i in range(len(whole))]
            ends = [event.index for event in events if event.finish_reason is not None]
            assert sorted(ends) == list(range(len(whole))), f"{stream.request_id} ended {ends}"
            assert [answer.token_ids for answer in output.outputs] == written
            for answer, tokens in zip(output.outputs, whole, strict=True):
                broken_off = answer.finish_reason in BROKEN_OFF
                assert answer.token_ids == (tokens[: len(answer.token_ids)] if broken_off else tokens), self.marks(stream)
            errors += [output.error] if output.error is not None else []
        return errors


def assert_idle(cluster: Cluster) -> None:
    """No request, lease, transfer or block is left on any worker, once what they still had to say is taken in."""
    def is_idle(status):
        return (status.num_free_blocks == status.num_blocks
                and not (status.num_waiting or status.num_running or status.num_leases or status.num_transfers))

    def are_idle():
        return all(is_idle(status) for status in cluster.status().values())

    assert wait_until(lambda: are_idle() or (not cluster.step() and are_idle())), cluster.status()
    assert not cluster.has_work and not cluster._central.has_work


def assert_serves(cluster: Cluster, load: Load) -> None:
    """As if nothing had been."""
    run = Run(cluster, load)
    assert run.end() == [] and run.attempts == 1
    assert_idle(cluster)


# ---------------------------------------------------------------------------------------------- from outside


@contextmanager
def tampering(cluster: Cluster, sent=lambda worker_id, message: message, said=lambda worker_id, message: None) -> Iterator[None]:
    """Workers are told what `sent(worker_id, message)` makes of each message; `said` sees what they say before anybody."""
    executor = cluster._executor
    send, poll = executor.send, executor.poll

    def poll_and_look(timeout: float = 0.0):
        messages = poll(timeout)
        for worker_id, message in messages:
            said(worker_id, message)
        return messages

    executor.send = lambda worker_id, message: send(worker_id, sent(worker_id, message))
    executor.poll = poll_and_look
    try:
        yield
    finally:
        del executor.send, executor.poll


@contextmanager
def mapped_cache(cluster: Cluster, worker_id: str) -> Iterator[Tensor]:
    """A worker's KV cache, [layers, 2, blocks, block_size, kv_heads, head_dim], in this process too."""
    host = cluster._executor._host_of[worker_id]
    address = host.ready.addresses[worker_id]
    if isinstance(address.memory, HostMemory):
        yield address.memory.map().view(address.dtype).view(address.shape)
        return
    mapped = MappedDeviceMemory(address.memory, address.device)
    try:
        yield mapped.data.view(address.dtype).view(address.shape)
        torch.cuda.synchronize(address.device)
    finally:
        mapped.close()


def corrupt(cluster: Cluster, message: Prefilled) -> None:
    """Change what has arrived, before the worker it went to is told of it."""
    destination = message.destination
    with mapped_cache(cluster, destination.worker_id) as data:
        block_id = destination.block_ids[destination.num_cached // data.shape[3]]  # the first that travelled
        data[0, 0, block_id, 0] += 1


def breaking(request: Request) -> Request:
    """The step that draws for it raises."""
    return replace(request, seed=NO_NUMBER, sampling=replace(request.sampling, temperature=1.0))


@contextmanager
def stopped(run: Run, *worker_ids: str) -> Iterator[None]:
    """They do nothing meanwhile; who has been killed by then is gone."""
    pids = {run.pids[worker_id] for worker_id in worker_ids}
    for pid in pids:
        stop(pid)
    try:
        yield
    finally:
        for pid in pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGCONT)


def hold_blocks(cluster: Cluster, worker_id: str, count: int) -> Callable[[], None]:
    """Lease blocks of an idle worker. Returns what gives them back."""
    executor, block_size = cluster._executor, cluster.limits.block_size
    executor.send(worker_id, Reserve(Request(f"held on {worker_id}", [1] * (count * block_size))))
    said: list = []
    assert wait_until(lambda: said.extend(executor.poll(0.1)) or said)
    (_, granted), = said
    assert isinstance(granted, Granted) and len(granted.destination.block_ids) == count

    return lambda: cluster._central.fleet.release(granted.destination, "request", "writer")


def admissible_blocks(cluster: Cluster, worker_id: str) -> int:
    """All but those that admission leaves free."""
    num_blocks = cluster.status()[worker_id].num_blocks
    return num_blocks - num_blocks // 100


def forget_prefixes(cluster: Cluster) -> None:
    """So that prompts are computed, and sent, as the first time. Nothing may be open."""
    assert_idle(cluster)
    for worker_id in cluster.status():
        hold_blocks(cluster, worker_id, admissible_blocks(cluster, worker_id))()
    assert_idle(cluster)


def _prompts(cluster: Cluster, load: Load) -> list[list[int]]:
    """Token ids of each."""
    return [cluster._reader.read(prompt)[1] for prompt, _ in load.asked]


def workers_of(cluster: Cluster, role: str) -> list[str]:
    return [worker_id for worker_id, status in cluster.status().items() if status.role == role]


# ------------------------------------------------------------------------------- faults that all workers survive


class FaultsThatAllSurvive:
    """To inherit from, with fixtures `cluster` (disaggregated, with checksums) and `load` (some answers are sampled with
    n > 1, some prompts take several chunks)."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, cluster, load):
        forget_prefixes(cluster)
        yield
        assert_idle(cluster)
        assert_serves(cluster, load)

    @pytest.mark.parametrize("stage, num_drawn", [
        (Stage.QUEUED, 0), (Stage.RESERVING, 0), (Stage.PREFILL, 0), (Stage.DECODE, 1), (Stage.DECODE, 5)])
    def test_cancelled(self, cluster, load, stage, num_drawn):
        run = Run(cluster, load)
        with ExitStack() as still:
            if stage is Stage.RESERVING:  # nobody answers, so that it stays so
                still.enter_context(stopped(run, *run.pids))
            run.step_until(lambda: run.at(stage, num_drawn) is not None)
            victim = run.at(stage, num_drawn)
            victim.close()
        assert victim.finished and {answer.finish_reason for answer in victim.result().outputs} & {FinishReason.ABORT}
        assert run.end() == []
        assert run.anybody("cancelled") and run.attempts == 1

    @pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
    def test_the_client_goes_away(self, cluster, load, share):
        """From all of its requests at once."""
        run = Run(cluster, load)
        run.step_until(lambda: run.total >= share * load.num_tokens)
        for stream in run.streams:
            stream.close()
        assert run.is_over and run.end() == []

    def test_leaving_a_stream_early(self, cluster, load):
        for _ in cluster.stream(*load.asked[0]):
            break
        assert not cluster.has_work

    def test_d_is_out_of_blocks(self, cluster, load):
        """Requests wait in line until there are some; one that can't wait for so long is told."""
        give_back = [hold_blocks(cluster, worker_id, admissible_blocks(cluster, worker_id)) for worker_id in workers_of(cluster, "D")]
        run = Run(cluster, load)
        hasty = cluster.submit(*load.asked[0], timeout=0.3)
        run.step_until(lambda: hasty.finished)
        assert hasty.result().error == "timed out after 0.3 s (deadline given at submission)"
        assert any(cluster.timeline(stream.request_id).num_refusals for stream in run.streams)
        assert run.total == 0 and not run.anybody("KV transferred")
        for give in give_back:
            give()
        assert run.end() == [] and run.attempts == 1

    def test_p_is_out_of_blocks(self, cluster, load):
        """Prompts wait on P, with their leases on D."""
        give_back = [hold_blocks(cluster, worker_id, admissible_blocks(cluster, worker_id)) for worker_id in workers_of(cluster, "P")]
        run = Run(cluster, load)
        run.step_until(lambda: run.at(Stage.PREFILL) is not None)
        waits_until = time.monotonic() + 0.2
        run.step_until(lambda: time.monotonic() > waits_until)
        assert run.total == 0 and sum(cluster.status()[worker_id].num_waiting for worker_id in workers_of(cluster, "P"))
        for give in give_back:
            give()
        assert run.end() == [] and run.attempts == 1

    def test_few_blocks_everywhere(self, cluster, load):
        """Hardly more than the longest request needs."""
        longest = max(len(token_ids) + max(map(len, whole))
                      for token_ids, whole in zip(_prompts(cluster, load), load.whole, strict=True))
        spare = 2 * (longest // cluster.limits.block_size + 1)
        give_back = [hold_blocks(cluster, worker_id, admissible_blocks(cluster, worker_id) - spare) for worker_id in cluster.status()]
        run = Run(cluster, load)
        assert run.end() == [] and run.attempts == 1
        for give in give_back:
            give()

    @pytest.mark.parametrize("message_type", [Prefill, Reserve], ids=["on P", "on D"])  # by which each gets to know a request
    def test_a_step_raises(self, cluster, load, message_type):
        """Those that are in it are told; the others go on."""
        broken: list[str] = []

        def break_one(worker_id, message):
            if not isinstance(message, message_type) or message.request.request_id not in (broken or [message.request.request_id]):
                return message
            broken[:] = [message.request.request_id]  # also when it is refused, and asked about again
            return replace(message, request=breaking(message.request))

        with tampering(cluster, sent=break_one):
            run = Run(cluster, load)
            errors = run.end()
        assert errors and all(error.startswith(STEP_ERROR) for error in errors)
        victim, = (stream for stream in run.streams if stream.request_id == broken[0])
        assert victim.result().error in errors and run.attempts == 1

    def test_a_transfer_is_corrupted(self, cluster, load):
        """Each request's first one."""
        def corrupt_first(worker_id, message):
            if isinstance(message, Prefilled) and "/" not in message.request_id:
                corrupt(cluster, message)

        with tampering(cluster, said=corrupt_first):
            run = Run(cluster, load)
            assert run.end() == []
        assert run.attempts == 2
        assert any(CORRUPTED in mark for stream in run.streams for mark in run.marks(stream))

    def test_all_transfers_of_a_request_are_corrupted(self, cluster, load):
        """It is tried four times, and told so."""
        run = Run(cluster, load)
        victim = run.streams[-1]

        def corrupt_its(worker_id, message):
            if isinstance(message, Prefilled) and message.request_id.split("/")[0] == victim.request_id:
                corrupt(cluster, message)

        with tampering(cluster, said=corrupt_its):
            error, = run.end()
        assert error == victim.result().error
        assert error.startswith("gave up after 4 attempts: what arrived at D") and error.count(CORRUPTED) == 4

    def test_roles_change_while_requests_flow(self, cluster, load):
        """One of a role that has several takes the other role, and its own again."""
        role, other = ("P", "D") if len(workers_of(cluster, "P")) > 1 else ("D", "P")
        worker_id = workers_of(cluster, role)[-1]
        for new in (other, role):
            run = Run(cluster, load)
            run.step_until(lambda run=run: run.total > 0)
            cluster.set_role(worker_id, new)
            assert run.end() == [] and run.attempts == 1
            assert wait_until(lambda new=new: cluster.step() or cluster.status()[worker_id].role == new)


# ------------------------------------------------------------------------------------------------- lost workers

# Each has its victim killed at a certain moment, and checks that the others answer everything nevertheless.


def lose_before_its_transfers(cluster: Cluster, load: Load, victim: str, reason: str = KILLED) -> None:
    """A prefill worker that has been sent prompts, and has not begun."""
    run = Run(cluster, load)
    with stopped(run, victim):
        run.step_until(lambda: run.anybody(f"sent to {victim}"))
        run.signal(victim)
        assert_outlived(run, victim, reason=reason)


def lose_amid_a_transfer(cluster: Cluster, load: Load, victim: str) -> None:
    """A prefill worker, when the beginning of a prompt's KV is in the destination's blocks, and its end is not."""
    for _ in range(20):  # with luck it is quicker than we look
        forget_prefixes(cluster)
        moment = AmidATransfer(cluster, victim, min_tokens=max(map(len, _prompts(cluster, load))) // 2)
        with tampering(cluster, sent=moment.watch):
            run = Run(cluster, load)
            run.step_until(lambda run=run, moment=moment: moment.destination is not None or run.is_over)
        if moment.destination is None:  # this time no long prompt went there
            assert run.end() == []
            continue
        with stopped(run, victim) if moment.comes() else nullcontext():
            if moment.is_now():
                run.signal(victim)
                assert_outlived(run, victim)
                return
        assert run.end() == []
    raise AssertionError("no transfer was caught under way")


class AmidATransfer:
    """Tells by the destination's memory how far a long prompt from a worker has come."""

    UNWRITTEN = 12345.0

    def __init__(self, cluster: Cluster, sender: str, min_tokens: int) -> None:
        self.destination: Destination | None = None
        self._cluster = cluster
        self._sender = sender
        self._min_tokens = min_tokens

    def watch(self, worker_id: str, message: ToWorker) -> ToWorker:
        """Choose the first such prompt, before the sender hears of it."""
        if (self.destination is None and isinstance(message, Prefill) and worker_id == self._sender
                and len(message.request.prompt_token_ids) >= self._min_tokens):
            self.destination = message.destination
            with mapped_cache(self._cluster, self.destination.worker_id) as data:
                for block_id in self._ends(data):
                    data[:, :, block_id] = self.UNWRITTEN
        return message

    def comes(self) -> bool:
        """Wait for the first block."""
        with mapped_cache(self._cluster, self.destination.worker_id) as data:
            first, _ = self._ends(data)
            return wait_until(lambda: data[0, 0, first, 0, 0, 0].item() != self.UNWRITTEN, pause=1e-4)

    def is_now(self) -> bool:
        """Whether the last block is still to come. The sender is stopped; its GPU ends what it has been given."""
        time.sleep(0.02)
        with mapped_cache(self._cluster, self.destination.worker_id) as data:
            _, last = self._ends(data)
            return data[-1, 1, last, 0, 0, 0].item() == self.UNWRITTEN

    def _ends(self, data: Tensor) -> tuple[int, int]:
        where = self.destination
        return where.block_ids[where.num_cached // data.shape[3]], where.block_ids[-1]


def lose_with_the_receiver_stopped(cluster: Cluster, load: Load, victim: str) -> None:
    """A prefill worker whose transfers can't end: nobody receives."""
    receivers = workers_of(cluster, "D")
    with ExitStack() as still:
        def stop_receivers(worker_id: str, message: ToWorker) -> ToWorker:
            if worker_id == victim and isinstance(message, Prefill) and not stopped_for:
                stopped_for.append(message.request.request_id)
                still.enter_context(stopped(run, *receivers))
            return message

        stopped_for: list[str] = []
        run = Run(cluster, load)
        with tampering(cluster, sent=stop_receivers):
            run.step_until(lambda: stopped_for)
        paused = time.monotonic() + 0.3
        run.step_until(lambda: time.monotonic() > paused)
        assert run.stage(stopped_for[0]) is Stage.PREFILL
        run.signal(victim)
    assert_outlived(run, victim)


def lose_after_its_transfers(cluster: Cluster, load: Load, victim: str) -> None:
    """A prefill worker that nobody needs any more."""
    run = Run(cluster, load)
    run.step_until(lambda: run.total and all(run.stage(stream.request_id) in (Stage.DECODE, None) for stream in run.streams))
    run.signal(victim)
    assert_outlived(run, victim, attempts=1)


def lose_amid_decode(cluster: Cluster, load: Load, victim: str, reason: str = KILLED) -> None:
    """A worker that has written a part of several answers."""
    run = Run(cluster, load)
    run.step_until(lambda: any((entry := run.entry(stream)) is not None and entry.stage is Stage.DECODE
                               and entry.server == victim and run.num_drawn[stream.request_id] > 5 for stream in run.streams))
    run.signal(victim)
    assert_outlived(run, victim, reason=reason)


def lose_by_hanging(cluster: Cluster, load: Load, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that neither answers nor goes."""
    monkeypatch.setattr(process, "PING_AFTER", 0.3)
    monkeypatch.setattr(cluster._executor, "_hang_timeout", 3.0)
    run = Run(cluster, load)
    run.step_until(lambda: run.anybody(f"sent to {victim}"))
    run.signal(victim, signal.SIGSTOP)
    assert_outlived(run, victim, reason="did not answer for 3 s")


def lose_by_a_bug(cluster: Cluster, load: Load, victim: str) -> None:
    """A worker that is told what makes no sense, and can't go on."""
    run = Run(cluster, load)
    run.step_until(lambda: run.anybody(f"sent to {victim}"))
    cluster._executor.send(victim, Resume("of nobody", lease_id=10**6, written=[]))
    assert_outlived(run, victim, reason="KeyError: 1000000")


def lose_by_a_bad_token(cluster: Cluster, load: Load, victim: str) -> None:
    """A decode worker on a GPU: what is written of an answer has a token far behind the vocabulary, and reading its
    embedding is an illegal memory access, after which nothing runs in that process any more."""
    spoiled: list[str] = []

    def spoil_one(worker_id: str, message: ToWorker) -> ToWorker:
        if spoiled or worker_id != victim or not isinstance(message, Resume):
            return message
        spoiled.append(message.request_id)
        first, *others = message.written
        return replace(message, written=[replace(first, token_ids=[*first.token_ids[:-1], 2**40]), *others])

    with tampering(cluster, sent=spoil_one):
        run = Run(cluster, load)
        assert_outlived(run, victim, reason="CUDA error")


def lose_all(cluster: Cluster, load: Load, reason: str = KILLED) -> None:
    run = Run(cluster, load)
    run.step_until(lambda: run.total >= load.num_tokens // 4)
    for pid in set(run.pids.values()):
        os.kill(pid, signal.SIGKILL)
    errors = run.end()
    assert errors and all("worker is left" in error and reason in error for error in errors)
    assert cluster.status() == {} and not set(run.pids.values()) & set(children())
    assert not cluster.has_work and not cluster._central.has_work


def assert_outlived(run: Run, victim: str, attempts: int = 2, reason: str = KILLED) -> None:
    """All is answered, by those that are left; the victim's whole process is gone."""
    assert run.end() == []
    pid = run.pids[victim]
    gone = {worker_id for worker_id in run.pids if run.pids[worker_id] == pid}
    assert run.attempts == attempts
    assert attempts == 1 or any("was lost" in mark and reason in mark and mark.split()[0] in gone
                                for stream in run.streams for mark in run.marks(stream))
    assert pid not in children() and run.cluster.status().keys() == run.pids.keys() - gone
    assert_idle(run.cluster)


# --------------------------------------------------------------------------------------------- at any moment

HARMLESS = ("cancel", "cancel an answer", "corrupt", "break on P", "break on D", "pause")


@dataclass(frozen=True)
class Event:
    """Something that happens when so many tokens have been drawn. `which` chooses the request or the process."""

    what: str  # one of HARMLESS, or "kill"
    moment: int
    which: int


def random_events(seed: int, num_tokens: int, count: int = 4) -> list[Event]:
    luck = Random(seed)
    return [Event(luck.choice(HARMLESS), luck.randrange(num_tokens), luck.randrange(100)) for _ in range(count)]


class Mishaps:
    """Lets a load run through events, and checks what comes of it."""

    def __init__(self, cluster: Cluster, load: Load) -> None:
        self._cluster = cluster
        self._load = load
        self._pending = {"corrupt": 0, "break on P": 0, "break on D": 0}  # for the next message of the kind

    def play(self, events: list[Event]) -> None:
        with tampering(self._cluster, sent=self._break, said=self._corrupt):
            run = Run(self._cluster, self._load)
            for event in sorted(events, key=lambda event: event.moment):
                while run.total < event.moment and not run.is_over:
                    run.step()
                self._happen(event, run)
            errors = run.end()
        self._assert_expected(errors, events)
        if self._cluster.status():
            assert_idle(self._cluster)

    def _happen(self, event: Event, run: Run) -> None:
        stream = run.streams[event.which % len(run.streams)]
        pids = sorted({run.pids[worker_id] for worker_id in self._cluster._executor.roles})
        pid = pids[event.which % len(pids)] if pids else None
        match event.what:
            case "cancel":
                stream.close()
            case "cancel an answer":
                events, _ = self._cluster._outputs.process(self._cluster._central.cancel(stream.request_id, 0))
                self._cluster._deliver(events)  # as a stop string would
            case "pause" if pid:
                os.kill(pid, signal.SIGSTOP)
                until = time.monotonic() + 0.02
                while time.monotonic() < until:
                    run.step()
                os.kill(pid, signal.SIGCONT)
            case "kill" if pid:
                os.kill(pid, signal.SIGKILL)
            case what if what in self._pending:
                self._pending[what] += 1

    def _corrupt(self, worker_id: str, message: FromWorker) -> None:
        if isinstance(message, Prefilled) and self._due("corrupt") and message.destination.worker_id in self._cluster._executor.roles:
            corrupt(self._cluster, message)

    def _break(self, worker_id: str, message: ToWorker) -> ToWorker:
        if (isinstance(message, Prefill) and self._due("break on P")) or (isinstance(message, Reserve) and self._due("break on D")):
            return replace(message, request=breaking(message.request))
        return message

    def _due(self, what: str) -> bool:
        due = self._pending[what] > 0
        self._pending[what] -= due
        return due

    def _assert_expected(self, errors: list[str], events: list[Event]) -> None:
        happened = {event.what for event in events}
        roles = set(self._cluster._executor.roles.values())
        for error in errors:
            if error.startswith(STEP_ERROR):
                assert happened & {"break on P", "break on D"}
            elif error.startswith("gave up after 4 attempts"):
                assert sum(event.what in ("kill", "corrupt") for event in events) >= 4
            else:
                assert "worker is left" in error and "killed by SIGKILL" in error and not roles >= {"P", "D"}
