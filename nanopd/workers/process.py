"""Workers in processes of their own: one process for each GPU, one for each worker on the CPU.

What starts and ends a process is left to a `Launcher`; here is that of this machine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import nanopd
from nanopd.engine.limits import Limits
from nanopd.interrupts import uninterrupted
from nanopd.messages import (
    AskHistory,
    AskStatus,
    FromWorker,
    History,
    Lost,
    Ping,
    Pong,
    Status,
    Tokens,
    ToWorker,
)
from nanopd.workers.host import Failed, Forget, FromHost, HostSpec, Learn, Ready, Stop, ToHost
from nanopd.workers.wire import Wire, wait_for

PING_AFTER = 5.0  # seconds of silence
WATCH_EVERY = 1.0  # seconds, at most, between two looks at who is silent
GRACE = 10.0  # seconds for a host to leave when it is asked to
QUIET_START = 2.0  # seconds a start may take before something is shown


class Process(Protocol):
    """A process that runs a host: how it is reached, ended and reaped."""

    wire: Wire
    clock_ahead: float  # seconds that its monotonic clock is ahead of ours

    def wait(self, timeout: float) -> str | None:
        """How it ended, and with it all that its device did for it; None if it has not within `timeout` seconds."""

    def kill(self) -> str:
        """End it now. Returns how it ended."""


class Launcher(Protocol):
    """Starts the processes of an executor."""

    def launch(self, specs: list[HostSpec]) -> Iterator[Process]:
        """One for each spec, in their order. Whoever calls it holds Ctrl-C back; where it takes long, it lets it through."""

    def close(self) -> None:
        """Give back what was needed to start them. They are over, or to be ended now."""


class Child:
    """A process of this machine, at the other end of a socket pair. It sees the same clock."""

    clock_ahead = 0.0

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.wire = Wire(ours)
            descriptor = theirs.fileno()
            # A session of its own: Ctrl-C on the terminal does not reach it.
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from nanopd.workers.host import main; main({descriptor})"], pass_fds=[descriptor],
                stdin=subprocess.DEVNULL, start_new_session=True, env=environment_of_child())

    def wait(self, timeout: float | None) -> str | None:
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with exit code {code}"

    def kill(self) -> str:
        self._process.kill()
        return self.wait(None)  # type: ignore[return-value]


class Children:
    """Launches them."""

    def launch(self, specs: list[HostSpec]) -> Iterator[Child]:
        return (Child() for _ in specs)

    def close(self) -> None:
        pass


class HostProcess:
    """A host as its parent sees it. Times in what it says are made ours."""

    def __init__(self, spec: HostSpec, process: Process) -> None:
        self.spec = spec
        self.process = process
        self.wire = process.wire
        self.worker_ids = list(spec.roles)
        self.ready: Ready | None = None
        self.error: Exception | None = None  # what it said before it left
        self.heard = time.monotonic()
        self.pinged: float | None = None  # when it was asked for a sign of life that has not come yet
        self.tell(spec)

    def tell(self, message: HostSpec | ToHost) -> None:
        match message:
            case (worker_id, AskHistory(since)) if self.process.clock_ahead:
                message = worker_id, AskHistory(since + self.process.clock_ahead)
        self.wire.send(message)

    def receive(self) -> list[tuple[str | None, FromHost]]:
        """What it has said. Raises EOFError once it has gone and all was heard."""
        messages = [message for batch in self.wire.receive() for message in batch]
        if messages:
            self.heard, self.pinged = time.monotonic(), None
        if ahead := self.process.clock_ahead:
            return [(worker_id, _earlier(message, ahead)) for worker_id, message in messages]
        return messages

    def is_hanging(self, timeout: float) -> bool:
        """Whether it has not answered for `timeout` seconds. Asks it where it has been silent for a while."""
        now = time.monotonic()
        if self.pinged is None:
            if now - self.heard > PING_AFTER:
                self.pinged = now
                self.tell((None, Ping()))
            return False
        return now - self.pinged > timeout

    def reap(self, grace: float = GRACE) -> str:
        """Wait until the process is over; kill it after `grace` seconds. Returns how it ended."""
        ended = self.process.wait(grace) or self.process.kill()
        self.wire.close()
        return ended if self.error is None else str(self.error)


def _earlier(message: FromHost, seconds: float) -> FromHost:
    """The same, with all moments that it names so much earlier."""
    match message:
        case Tokens(events):
            return Tokens([replace(event, time=event.time - seconds) for event in events])
        case History(steps, transfers):
            return History([replace(step, start=step.start - seconds) for step in steps],
                           [replace(sent, start=sent.start - seconds, computed=sent.computed - seconds, end=sent.end - seconds)
                            for sent in transfers])
    return message


class ProcessExecutor:
    """Runs the hosts of `specs`, and carries messages between the central scheduler and their workers.

    Args:
        hang_timeout: seconds without an answer after which a host is given up and killed.
        launcher: starts their processes. Default: on this machine.

    Raises:
        ConfigError, ModelError, OSError, RuntimeError: what kept a host from starting. Then none is left.
    """

    idle = True  # workers carry on by themselves

    def __init__(self, specs: list[HostSpec], hang_timeout: float = 60.0, launcher: Launcher | None = None) -> None:
        self.roles: dict[str, str] = {}
        self.limits: dict[str, Limits] = {}
        self.device_name = ""  # of the first host's device
        self._hang_timeout = hang_timeout
        self._hosts: list[HostProcess] = []
        self._host_of: dict[str, HostProcess] = {}
        self._arrived: list[tuple[str, FromWorker]] = []
        self._answers: dict[str, Status | History] = {}
        self._launcher = launcher or Children()
        self._close = weakref.finalize(self, _stop, self._hosts, self._launcher, os.getpid())  # at exit, too
        try:
            self._start(specs)
        except BaseException:
            self.close()
            raise

    def send(self, worker_id: str, message: ToWorker) -> None:
        """To a worker that is gone: dropped."""
        if worker_id in self._host_of:
            self._host_of[worker_id].tell((worker_id, message))

    def poll(self, timeout: float = 0.0) -> list[tuple[str, FromWorker]]:
        """What the workers have said, as (worker id, message). Waits for something at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        self._exchange(0.0 if self._arrived else timeout)
        while not self._arrived and (left := deadline - time.monotonic()) > 0:
            self._exchange(left)
        messages, self._arrived = self._arrived, []
        return messages

    def status(self) -> dict[str, Status]:
        """How each living worker is doing."""
        return self._ask(AskStatus())  # type: ignore[return-value]

    def history(self, since: float = 0.0) -> dict[str, History]:
        """What each living worker has done lately, of that what began at `since` or later."""
        return self._ask(AskHistory(since))  # type: ignore[return-value]

    def close(self) -> None:
        """End all processes. Waits until they are over."""
        with uninterrupted():
            self._close()
        self.roles.clear()
        self._host_of.clear()

    # ------------------------------------------------------------------------------------------- starting

    def _start(self, specs: list[HostSpec]) -> None:
        notice = threading.Timer(QUIET_START, print, [f"nanopd: starting {'; '.join(map(str, specs))}"], {"file": sys.stderr})
        notice.daemon = True
        notice.start()
        try:
            processes = self._launcher.launch(specs)
            for spec in specs:
                with uninterrupted():
                    self._hosts.append(HostProcess(spec, next(processes)))
            self._await_ready()
        finally:
            notice.cancel()
        self.device_name = self._hosts[0].ready.device_name
        addresses = {worker_id: address for host in self._hosts for worker_id, address in host.ready.addresses.items()}
        for host in self._hosts:
            host.tell((None, Learn(addresses)))
            self.limits |= host.ready.limits
            self.roles |= host.spec.roles
            self._host_of |= dict.fromkeys(host.worker_ids, host)

    def _await_ready(self) -> None:
        while missing := [host for host in self._hosts if host.ready is None]:
            wait_for([host.wire for host in missing])
            for host in missing:
                self._hear_of_start(host)

    @staticmethod
    def _hear_of_start(host: HostProcess) -> None:
        try:
            for _, message in host.receive():
                if isinstance(message, Failed):
                    raise message.error
                host.ready = message
        except EOFError:
            raise RuntimeError(f"{host.spec} did not start: {host.reap()}") from None

    # -------------------------------------------------------------------------------------------- serving

    def _exchange(self, timeout: float) -> None:
        """Wait until a host says something, at most `timeout` seconds; take in what all have said; look for the dead."""
        ready = wait_for([host.wire for host in self._hosts], min(timeout, WATCH_EVERY))
        with uninterrupted():
            for host in list(self._hosts):
                if host.wire.fileno() in ready:
                    self._listen(host)
                elif host.is_hanging(self._hang_timeout):
                    host.reap(grace=0.0)
                    self._bury(host, f"did not answer for {self._hang_timeout:g} s")

    def _listen(self, host: HostProcess) -> None:
        host.wire.flush()
        try:
            for worker_id, message in host.receive():
                self._take(host, worker_id, message)
        except EOFError:
            self._bury(host, host.reap())

    def _take(self, host: HostProcess, worker_id: str | None, message: FromHost) -> None:
        match message:
            case Pong():
                pass
            case Failed():
                host.error = message.error
            case Status() | History():
                self._answers[worker_id] = message
            case _:
                self._arrived.append((worker_id, message))

    def _bury(self, host: HostProcess, reason: str) -> None:
        """Its process is over: nobody writes on its behalf any more."""
        self._hosts.remove(host)
        for worker_id in host.worker_ids:
            del self.roles[worker_id], self._host_of[worker_id]
            self._arrived.append((worker_id, Lost(reason)))
        for other in self._hosts:
            other.tell((None, Forget(host.worker_ids)))

    def _ask(self, question: AskStatus | AskHistory) -> dict[str, Status | History]:
        """Ends because a worker answers, or is lost, or is given up."""
        self._answers.clear()
        for worker_id in self.roles:
            self.send(worker_id, question)
        while not self.roles.keys() <= self._answers.keys():
            self._exchange(WATCH_EVERY)
        return {worker_id: self._answers[worker_id] for worker_id in self.roles}


def _stop(hosts: list[HostProcess], launcher: Launcher, owner: int) -> None:
    """Ask all to leave, and kill those that don't."""
    if os.getpid() != owner:
        return  # a fork of the owner: they are not its to stop
    for host in hosts:
        host.tell((None, Stop()))
        host.wire.close()
        if host.ready is None:
            host.process.kill()  # it loads a model that nobody waits for
    deadline = time.monotonic() + GRACE
    for host in hosts:
        host.reap(max(0.0, deadline - time.monotonic()))
    hosts.clear()
    launcher.close()


def environment_of_child() -> dict[str, str]:
    """The child imports this nanopd, wherever it is, and nothing from the folder that it happens to run in."""
    paths = [str(Path(nanopd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
