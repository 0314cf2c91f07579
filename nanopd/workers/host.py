"""A process that runs workers: all those of one GPU, or one on the CPU. Started for a `ProcessExecutor`.

It reads its HostSpec, answers Ready or Failed, and carries messages between the connection and its workers until it is
told to Stop. When the connection ends without that, its parent is gone, and so is it, whatever it was doing.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch

from nanopd.block_manager.pool import EVENTS_KEPT
from nanopd.config import ConfigError, ModelSpec
from nanopd.engine.factory import EngineOptions, build_engine, device_name
from nanopd.engine.limits import Limits
from nanopd.messages import FromWorker, Ping, Pong, Tokens, ToWorker
from nanopd.models.loader import ModelError, load_model
from nanopd.paged_attention.build import load_kernels
from nanopd.workers.affinity import stay_near
from nanopd.workers.links import Address, Links
from nanopd.workers.network import Network
from nanopd.workers.transfer import TransferError, Transport
from nanopd.workers.wire import Wire, wait_for, wait_for_end, wait_for_room
from nanopd.workers.worker import PATIENCE, Worker

BRIEFLY = 1e-4  # seconds that first tokens wait for the last layers right behind them, to go in one message
NOTHING_RAN = 0.005  # seconds until a worker whose requests all wait for blocks looks again
LAST_STEP = 5.0  # seconds that a step may still take once the parent is gone


@dataclass(frozen=True)
class HostSpec:
    """What a host is to run."""

    host: int  # its number
    roles: dict[str, str]  # worker ids and their roles
    device: str
    model: str
    shape: ModelSpec  # the model's, read by the parent: each host would have to import transformers for it
    dtype: str | torch.dtype | None
    load_format: str
    seed: int
    options: EngineOptions
    transport: str
    checksums: bool
    num_threads: int = 1  # of torch, on the CPU

    def __str__(self) -> str:
        return f"{', '.join(self.roles)} on {self.device}"


# ------------------------------------------------------- between the parent and the host, not its workers


@dataclass(frozen=True)
class Learn:
    """Where all workers are."""

    addresses: dict[str, Address]


@dataclass(frozen=True)
class Forget:
    """These workers are gone."""

    worker_ids: list[str]


@dataclass(frozen=True)
class Stop:
    """Leave."""


@dataclass(frozen=True)
class Ready:
    """The workers can begin."""

    limits: dict[str, Limits]
    addresses: dict[str, Address]
    device_name: str  # as the device calls itself


@dataclass(frozen=True)
class Failed:
    """The host can't start, or can't go on. It leaves."""

    error: Exception


ToHost = tuple[str, ToWorker] | tuple[None, Learn | Forget | Ping | Stop]
FromHost = tuple[str, FromWorker] | tuple[None, Ready | Failed | Pong]


def build_workers(spec: HostSpec, connect: Callable[[str, str], Transport],
                  events_kept: int = EVENTS_KEPT) -> dict[str, Worker]:
    """The workers of a spec, in this process: each with a cache of its own, all with the same weights.

    `connect(source, destination)` gives the transport from worker to worker; `events_kept` is the block managers'. Raises
    ConfigError and ModelError.
    """
    device = torch.device(spec.device)
    model = load_model(spec.model, shape=spec.shape, device=device, dtype=spec.dtype, load_format=spec.load_format,
                       seed=spec.seed)
    workers = {}
    for num_built, (worker_id, role) in enumerate(spec.roles.items()):
        share = 1 / (len(spec.roles) - num_built)  # of the memory that the others have left
        engine = build_engine(model, device, spec.options, share, events_kept)
        workers[worker_id] = Worker(
            worker_id, role, engine, engine.runner.cache, partial(connect, worker_id), spec.checksums)
    return workers


class Host:
    """The workers of this process, stepped in turn while they have work."""

    def __init__(self, spec: HostSpec, wire: Wire, network: Network | None = None) -> None:
        self._wire = wire
        self.links = Links(spec.host, spec.transport, torch.device(spec.device), network)
        self.workers = build_workers(spec, self.links.connect, events_kept=0)  # nobody could look at them in here
        self._num_said = 0
        for worker in self.workers.values():
            worker.on_handover = partial(self._pass_on, worker)
        self.addresses = {worker_id: self.links.publish(worker_id, worker.cache) for worker_id, worker in self.workers.items()}

    @property
    def limits(self) -> dict[str, Limits]:
        return {worker_id: worker.engine.limits for worker_id, worker in self.workers.items()}

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            EOFError: the parent is gone.
            RuntimeError: the device is broken. What ran here can run elsewhere.
        """
        patience: float | None = None  # seconds to wait for mail; None: nobody has work, so for as long as it takes
        while self._take_mail(patience):
            ran = [self._step(worker) for worker in self.workers.values() if worker.has_work]
            patience = (0.0 if any(ran) else NOTHING_RAN) if ran else None

    def close(self) -> None:
        self.links.close()

    def _take_mail(self, patience: float | None) -> bool:
        """Hand out what has come. Returns whether to go on.

        This thread reads for itself: to be woken by one that reads would take longer than the message took to get here.
        The parent never waits for that, since it keeps what the socket does not take.
        """
        if patience != 0:
            wait_for([self._wire], patience)
        for worker_id, message in self._wire.receive():
            if worker_id is not None:
                self.workers[worker_id].inbox.append(message)
            elif isinstance(message, Stop):
                return False
            else:
                self._take_own(message)
        return True

    def _take_own(self, message: Learn | Forget | Ping) -> None:
        match message:
            case Learn():
                self.links.learn(message.addresses)
            case Forget():
                for worker_id in message.worker_ids:
                    self.links.forget(worker_id)
            case Ping():
                _say(self._wire, [(None, Pong())])

    def _step(self, worker: Worker) -> bool:
        """Returns whether there was anything to do, other than to wait for blocks."""
        said_before, steps_before = self._num_said, worker.engine.num_steps
        worker.step()
        if worker.transfers:
            worker.finish_transfers(BRIEFLY)
        self._pass_on(worker)
        if worker.transfers:
            worker.finish_transfers(PATIENCE)
            self._pass_on(worker)
        return self._num_said > said_before or worker.engine.num_steps > steps_before or bool(worker.transfers)

    def _pass_on(self, worker: Worker) -> None:
        """Say what is in the outbox."""
        messages = list(worker.outbox)
        worker.outbox.clear()
        _raise_if_broken(messages)
        if messages:
            self._num_said += len(messages)
            _say(self._wire, [(worker.worker_id, message) for message in messages])


def _raise_if_broken(messages: list[FromWorker]) -> None:
    """After a CUDA error nothing runs in this process any more; the engine took it for the fault of a step's requests."""
    for message in messages:
        for event in message.events if isinstance(message, Tokens) else ():
            if event.error is not None and ("CUDA error" in event.error or event.error.startswith("AcceleratorError")):
                raise RuntimeError(event.error)


def _say(wire: Wire, messages: list[FromHost]) -> None:
    wire.send(messages)
    wait_for_room(wire)


def _outlive(wire: Wire) -> None:
    """Leave a little after the parent, where the main thread has not: it may be in a step that never ends."""
    wait_for_end(wire)
    time.sleep(LAST_STEP)
    _leave(1)


def main(descriptor: int) -> NoReturn:
    """The process. `descriptor` is its end of the connection."""
    os.set_inheritable(descriptor, False)
    _leave(serve(Wire(socket.socket(fileno=descriptor))))


def serve(wire: Wire, network: Network | None = None, device: str | None = None) -> int:
    """All that a host does. Returns the exit code of this process, which is of no more use.

    Args:
        network: to the parent and the other hosts, where they may be on other machines.
        device: what the GPU that is meant for this host is called here, where that is not what its spec calls it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    threading.Thread(target=_outlive, args=(wire,), daemon=True).start()
    try:
        spec = _receive_spec(wire)
        if device is not None and spec.device != "cpu":
            spec = replace(spec, device=device)
        _prepare(spec)
        host = Host(spec, wire, network)
        _say(wire, [(None, Ready(host.limits, host.addresses, device_name(spec.device)))])
        host.run()
        host.close()
    except EOFError:
        return 1
    except Exception as error:
        _say(wire, [(None, Failed(_tellable(error)))])
        return 1
    return 0


def _leave(code: int) -> NoReturn:
    """At once: the interpreter's own way out takes its time, and trips over a device that is broken."""
    sys.stderr.flush()
    os._exit(code)


def _receive_spec(wire: Wire) -> HostSpec:
    """What the parent says first; nothing else until the host is ready."""
    while True:
        wait_for([wire])
        for message in wire.receive():
            return message


def _prepare(spec: HostSpec) -> None:
    torch.set_num_threads(spec.num_threads)
    if torch.device(spec.device).type == "cuda":
        torch.cuda.set_device(spec.device)  # or events, pinned memory and a context of this process would be on GPU 0
        stay_near(torch.device(spec.device))
        load_kernels()  # may compile for a minute, which a step must not


def _tellable(error: Exception) -> Exception:
    """What the user can put right, as it is; anything else by its name, with the rest on stderr."""
    if isinstance(error, (ConfigError, ModelError, TransferError, OSError)):
        return error
    traceback.print_exception(error)
    return RuntimeError(f"{type(error).__name__}: {error}")
