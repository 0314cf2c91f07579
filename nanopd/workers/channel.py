"""Transports with two ends: a thread here that sends and one there that receives, and what they say to each other.

Bytes travel in pieces, each through one of a few slots, so that a piece is loaded while others travel and are stored.
How the bytes get from slot to slot is left to the transports built on this.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener

import torch
from torch import Tensor

from nanopd.block_manager.cache import KVCache
from nanopd.workers.network import ANSWER_TIME, LOOPBACK, ask_in, hang_up, let_in, limit_waiting, send_at_once
from nanopd.workers.transfer import Ticket, TransferError

SLOTS = 8
SLOT_BYTES = 2**24
PAUSE = 1e-4  # seconds between two looks at copies on their way


@dataclass(frozen=True)
class Hello:
    """The first message of a connection. `setup` is what the transport's other end is built from."""

    source_id: str
    destination_id: str
    transport: str
    slot_bytes: int
    setup: object


@dataclass(frozen=True)
class Piece:
    """As much as fits a slot, of some layers."""

    layers: range
    source_blocks: list[int]
    destination_blocks: list[int]
    computed: torch.cuda.Event | None  # passes when the source may be read


@dataclass(frozen=True)
class Arrival:
    """A piece is in a slot, or will be as soon as the other end reads it, and belongs into these blocks."""

    layers: range
    block_ids: list[int]
    slot: int


GOODBYE = None  # no more pieces; the other end finishes what it has and hangs up


def slot_bytes_for(cache: KVCache) -> int:
    return max(SLOT_BYTES, _bytes_in_layer(cache))


def view_blocks(memory: Tensor, cache: KVCache, layers: range, count: int) -> Tensor:
    """The start of some bytes as blocks, [layers, 2, count, block_size, kv_heads, head_dim]."""
    shape = (len(layers), 2, count, *cache.data.shape[3:])
    return memory[: len(layers) * count * _bytes_in_layer(cache)].view(cache.data.dtype).view(shape)


def split(cache: KVCache, layers: range, count: int, slot_bytes: int) -> list[tuple[range, slice]]:
    """Cut `count` blocks of some layers into pieces (layers, places in the list of blocks) that fit a slot."""
    fitting = slot_bytes // _bytes_in_layer(cache)
    if count <= fitting:
        together = fitting // count
        return [(layers[i : i + together], slice(0, count)) for i in range(0, len(layers), together)]
    return [(layers[i : i + 1], slice(first, first + fitting))
            for i in range(len(layers)) for first in range(0, count, fitting)]


def _bytes_in_layer(cache: KVCache) -> int:
    return cache.bytes_per_block // cache.num_layers


class DeviceWork:
    """What a thread needs to work on a cache's device behind the back of the thread that computes: a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def entered(self) -> ExitStack:
        """A context in which torch works on that stream."""
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())  # as the runners: a cache may have been made in it
        if self.stream is not None:
            stack.enter_context(torch.cuda.stream(self.stream))
        return stack

    def record(self) -> torch.cuda.Event | None:
        """Passes when the stream has come so far; None where there is nothing to wait for."""
        return None if self.stream is None else self.stream.record_event()

    def finish(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


def _passed(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()


# ------------------------------------------------------------------------------------------------- the sending end


class TwoSidedTransport(ABC):
    """Queues pieces for a thread that loads them and tells the other end; another thread reads what has been stored there.

    A ticket fails only when the other end has hung up, so that by then nobody writes to the destination's blocks.
    """

    name: str

    def __init__(self, source: KVCache, connection: Connection, slot_bytes: int) -> None:
        self._source = source
        self._connection = connection
        self._slot_bytes = slot_bytes
        self._work = DeviceWork(source.data.device)
        self._changed = threading.Condition()
        self._queue: deque[Piece] = deque()
        self._queued = self._loaded = self._stored = 0  # pieces, counted from the start
        self._closing = self._ended = False
        self._reason = "the worker that it goes to is gone"
        self._threads = [threading.Thread(target=run, name=f"nanopd-{self.name}", daemon=True)
                         for run in (self._send_pieces, self._read_answers)]
        for thread in self._threads:
            thread.start()

    def send(self, layers: range, source_blocks: list[int], destination_blocks: list[int]) -> Ticket:
        stream = self._work.stream
        computed = None if stream is None else torch.cuda.current_stream(stream.device).record_event()
        pieces = [Piece(some, source_blocks[places], destination_blocks[places], computed)
                  for some, places in split(self._source, layers, len(source_blocks), self._slot_bytes)]
        with self._changed:
            if self._closing or self._ended:
                raise TransferError(self._reason)
            self._queue.extend(pieces)
            self._queued += len(pieces)
            self._changed.notify_all()
            return _PieceTicket(self, self._queued)

    def wait_for(self, number: int, timeout: float | None) -> bool:
        """Whether so many pieces have been stored. Raises TransferError if they never will."""
        with self._changed:
            self._changed.wait_for(lambda: self._stored >= number or self._ended, timeout)
            if self._stored >= number:
                return True
            if self._ended:
                raise TransferError(self._reason)
            return False

    def close(self) -> None:
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._abandon()
        hang_up(self._connection)
        for thread in self._threads:
            thread.join()
        self._connection.close()
        self._work.finish()
        self._release()

    @abstractmethod
    def _load(self, piece: Piece, slot: int) -> torch.cuda.Event | None:
        """Bring a piece into a slot. The other end is told when the event passes."""

    @abstractmethod
    def _abandon(self) -> None:
        """Make a `_load` that waits for the other end fail."""

    @abstractmethod
    def _release(self) -> None:
        """Give back the slots. No thread uses them any more."""

    def _send_pieces(self) -> None:
        loaded: deque[tuple[Arrival, torch.cuda.Event | None]] = deque()
        try:
            with self._work.entered():
                while not self._closing:
                    piece = self._next_piece(PAUSE if loaded else None)
                    if piece is not None:
                        slot = self._loaded % SLOTS
                        self._loaded += 1
                        loaded.append((Arrival(piece.layers, piece.destination_blocks, slot), self._load(piece, slot)))
                    while loaded and _passed(loaded[0][1]):
                        self._connection.send(loaded.popleft()[0])
        except (EOFError, OSError):
            pass  # the other end has hung up, which the other thread hears too
        except Exception as error:
            self._reason = f"blocks could not be sent: {error}"
        with suppress(OSError):
            self._connection.send(GOODBYE)

    def _next_piece(self, timeout: float | None) -> Piece | None:
        """Waits for a piece and a free slot."""
        def ready() -> bool:
            return bool(self._queue) and self._loaded - self._stored < SLOTS

        with self._changed:
            self._changed.wait_for(lambda: self._closing or ready(), timeout)
            return self._queue.popleft() if ready() and not self._closing else None

    def _read_answers(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                answer = self._connection.recv()
                with self._changed:
                    if isinstance(answer, str):
                        self._reason = answer
                    else:
                        self._stored = answer
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._queue.clear()
            self._changed.notify_all()


class _PieceTicket:
    def __init__(self, transport: TwoSidedTransport, number: int) -> None:
        self._transport = transport
        self._number = number

    def wait(self, timeout: float | None = None) -> bool:
        return self._transport.wait_for(self._number, timeout)


# ----------------------------------------------------------------------------------------------- the receiving end


class Receiver(ABC):
    """The other end of one connection: stores pieces into a cache as they arrive, and answers how many are there."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._work = DeviceWork(cache.data.device)

    def run(self, connection: Connection) -> None:
        """Until the sender hangs up. When this returns nothing is written to the cache any more."""
        try:
            with self._work.entered():
                self._store_pieces(connection)
        except (EOFError, OSError):
            pass
        except Exception as error:
            with suppress(OSError):
                connection.send(f"blocks could not be stored: {error}")
        finally:
            self.abandon()
            self._work.finish()
            self._release()

    @abstractmethod
    def abandon(self) -> None:
        """Make a `_store` that waits for the sender fail."""

    @abstractmethod
    def _store(self, arrival: Arrival) -> torch.cuda.Event | None:
        """Write a piece to the cache. It is there, and its slot free, when the event passes."""

    @abstractmethod
    def _release(self) -> None:
        """Give back the slots."""

    def _store_pieces(self, connection: Connection) -> None:
        stored, pending = 0, deque[torch.cuda.Event | None]()
        while True:
            before = stored
            while pending and _passed(pending[0]):
                pending.popleft()
                stored += 1
            if stored > before:
                connection.send(stored)
            if not pending or connection.poll(PAUSE):
                arrival = connection.recv()
                if arrival is GOODBYE:
                    return
                pending.append(self._store(arrival))


# ---------------------------------------------------------------------------------------------------- the greeting


@dataclass(frozen=True)
class Door:
    """Where a `Reception` is found, and what one must know to be let in."""

    address: str | tuple[str, int]
    key: bytes | None = field(repr=False)  # None: the secret of the network that both belong to


class Reception:
    """Waits for other processes' connections, and runs a receiver for each, in a thread of its own.

    Args:
        address: the one to listen on. None: a socket of this machine, which has no file, so that none is left behind.
        receive: receive(hello) makes the receiver. Raises TransferError.
        key: what whoever comes has to know. Default: one that nobody knows yet.
    """

    def __init__(self, address: str | None, receive: Callable[[Hello], Receiver], key: bytes | None = None) -> None:
        local = address is None and sys.platform == "linux"
        self._listener = Listener(f"\0nanopd-{secrets.token_hex(8)}" if local else (address or LOOPBACK, 0), backlog=64)
        name = self._listener.address
        self.door = Door(name.decode() if isinstance(name, bytes) else name, key or secrets.token_bytes(32))
        self._receive = receive
        self._lock = threading.Lock()
        self._visits: dict[threading.Thread, _Visit] = {}  # those that have ended stay until the next one comes
        self._forgotten: set[str] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._accept, name="nanopd-reception", daemon=True)
        self._thread.start()

    def forget(self, source_id: str) -> None:
        """That worker is gone; when this returns, nothing that it sent is written any more."""
        with self._lock:
            self._forgotten.add(source_id)
            visits = {thread: visit for thread, visit in self._visits.items() if visit.source_id == source_id}
        self._end(visits)

    def close(self) -> None:
        self._closing = True
        with suppress(OSError):
            Client(self.door.address).close()  # wakes the thread up
        self._thread.join()
        self._listener.close()
        with self._lock:
            visits = dict(self._visits)
        self._end(visits)

    def _end(self, visits: dict[threading.Thread, _Visit]) -> None:
        for thread, visit in visits.items():
            visit.end()
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                time.sleep(0.01)  # who came has gone again, or there are too many open files
                continue
            if self._closing:
                connection.close()
                return
            thread = threading.Thread(target=self._serve, args=(connection,), name="nanopd-receiver", daemon=True)
            with self._lock:
                self._visits = {other: visit for other, visit in self._visits.items() if other.is_alive()}
                self._visits[thread] = _Visit(connection)
                thread.start()

    def _serve(self, connection: Connection) -> None:
        with self._lock:
            visit = self._visits[threading.current_thread()]
        with connection:
            try:
                send_at_once(connection)
                limit_waiting(connection, ANSWER_TIME)
                let_in(connection, self.door.key)
                hello = connection.recv()
                with self._lock:
                    visit.source_id = hello.source_id
                    welcome = hello.source_id not in self._forgotten
                if welcome:
                    self._run(connection, visit, hello)
            except Exception:
                pass  # a stranger, or somebody who died at the door
            finally:
                visit.receiver = None

    def _run(self, connection: Connection, visit: _Visit, hello: Hello) -> None:
        try:
            visit.receiver = self._receive(hello)
        except Exception as error:
            connection.send(f"{hello.destination_id} can't receive by {hello.transport}: {error}")
            return
        connection.send(None)
        limit_waiting(connection, 0)
        visit.receiver.run(connection)


class _Visit:
    """One connection to a reception."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.source_id: str | None = None
        self.receiver: Receiver | None = None

    def end(self) -> None:
        receiver = self.receiver
        if receiver is not None:
            receiver.abandon()
        hang_up(self.connection)


def knock(door: Door, hello: Hello) -> Connection:
    """A connection to another process's reception. Its answer to `hello` has yet to be read, by `await_welcome`."""
    try:
        connection = Client(door.address)
    except OSError as error:
        raise TransferError(f"worker {hello.destination_id} can't be reached: {error}") from error
    try:
        send_at_once(connection)
        limit_waiting(connection, ANSWER_TIME)
        ask_in(connection, door.key)
        connection.send(hello)
    except Exception as error:
        connection.close()
        raise TransferError(f"worker {hello.destination_id} did not answer: {error}") from error
    return connection


def await_welcome(connection: Connection, hello: Hello) -> None:
    """Raises TransferError if the other side refuses, or says nothing for too long; the connection is closed then."""
    try:
        refusal = connection.recv()
    except (EOFError, OSError) as error:
        refusal = f"worker {hello.destination_id} did not answer: {error or 'it hung up'}"
    if refusal is not None:
        connection.close()
        raise TransferError(refusal)
    limit_waiting(connection, 0)

