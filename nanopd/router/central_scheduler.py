"""The central scheduler: every request's way through the workers, by messages only. No torch.

Collocated, one worker does it all. Disaggregated, in order:

    Reserve to D  ->  Granted, or Refused: the request stays in line (backpressure)
    Prefill to P  ->  P computes the prompt, writes its KV into D's leased blocks layer by layer, draws the first token
    Prefilled     ->  Resume to D, which decodes from there

D's blocks are leased to two holders, the request and the writer, and are free once both have let go.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from nanopd.core import FinishReason, Request, TokenEvent
from nanopd.engine.limits import Limits
from nanopd.messages import (
    Cancel,
    Destination,
    FromWorker,
    Granted,
    Prefill,
    Prefilled,
    Refused,
    ReleaseLease,
    Reserve,
    Resume,
    Serve,
    Tokens,
    ToWorker,
    WriteEnded,
)

TIMELINES_KEPT = 4096


class Executor(Protocol):
    """Carries messages to workers and back."""

    roles: dict[str, str]

    def send(self, worker_id: str, message: ToWorker) -> None: ...

    def poll(self) -> list[tuple[str, FromWorker]]: ...

    @property
    def idle(self) -> bool: ...


class Stage(Enum):
    """Where a request is on its way."""

    QUEUED = "queued"
    RESERVING = "reserving"
    PREFILL = "prefill"
    DECODE = "decode"  # also a collocated request, from the start
    CLOSED = "closed"


@dataclass
class Timeline:
    """When a request got where (seconds, monotonic clock), and through which workers."""

    path: list[str] = field(default_factory=list)  # worker ids, in order
    marks: list[tuple[str, float]] = field(default_factory=list)  # (what happened, when)
    num_refusals: int = 0

    def mark(self, what: str) -> None:
        self.marks.append((what, time.monotonic()))

    def __str__(self) -> str:
        return " -> ".join(self.path)


@dataclass
class _Entry:
    """One open request."""

    request: Request
    open_answers: set[int]
    stage: Stage = Stage.QUEUED
    destination: Destination | None = None
    refused_by: set[str] = field(default_factory=set)
    timeline: Timeline = field(default_factory=Timeline)


class CentralScheduler:
    """Admits requests, sends each along its pipeline, and returns what the workers draw."""

    def __init__(self, executor: Executor, mode: str, limits: Limits) -> None:
        self.executor = executor
        self.mode = mode
        self.limits = limits
        self.timelines: dict[str, Timeline] = {}
        self._entries: dict[str, _Entry] = {}
        self._queue: deque[str] = deque()
        self._load: Counter[str] = Counter()  # requests each worker has in hand or was asked to take
        self._events: list[TokenEvent] = []
        self._handlers: dict[type, Callable] = {
            Tokens: self._on_tokens, Granted: self._on_granted, Refused: self._on_refused,
            Prefilled: self._on_prefilled, WriteEnded: self._on_write_ended,
        }

    def submit(self, request: Request) -> None:
        """Take a request in. Raises InvalidRequest if no worker could ever serve it."""
        self.limits.check(request)
        entry = _Entry(request, set(range(request.num_answers)))
        entry.timeline.mark("queued")
        self._entries[request.request_id] = entry
        self.timelines[request.request_id] = entry.timeline
        if len(self.timelines) > TIMELINES_KEPT:
            del self.timelines[next(iter(self.timelines))]
        self._queue.append(request.request_id)

    def step(self) -> list[TokenEvent]:
        """Send out what is in line, let the workers step, take in what they say. Returns the tokens drawn."""
        self._dispatch()
        self._poll()
        self._settle()
        events, self._events = self._events, []
        return events

    def _poll(self) -> None:
        for worker_id, message in self.executor.poll():
            self._handlers[type(message)](worker_id, message)

    def _settle(self) -> None:
        """When the last request has ended, see to it that every lease and cancel reaches its worker now."""
        while not self._entries and not self.executor.idle:
            self._poll()

    @property
    def has_work(self) -> bool:
        return bool(self._entries)

    def cancel(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        """End a request, or one of the answers it has begun, wherever it is. What it held on workers is given back.

        A beam search has no answers until it is over, so it ends as a whole or not at all.
        """
        entry = self._entries.get(request_id)
        if entry is None or (index is not None and entry.request.beam):
            return []
        ended = sorted(entry.open_answers if index is None else entry.open_answers & {index})
        for worker_id in entry.timeline.path:
            self.executor.send(worker_id, Cancel(request_id, index))
        entry.open_answers -= set(ended)
        self._close_if_ended(request_id)
        self._settle()
        return [TokenEvent(request_id, i, finish_reason=FinishReason.ABORT) for i in ended]

    # -------------------------------------------------------------------------------------- sending out

    def _dispatch(self) -> None:
        """First come, first served: a request that was refused room holds back those behind it."""
        for request_id in list(self._queue):
            entry = self._entries[request_id]
            if self.mode == "collocated":
                self._queue.popleft()
                self._serve(entry)
                continue
            if entry.stage is Stage.QUEUED:
                self._reserve(entry)
            if entry.timeline.num_refusals:
                return

    def _serve(self, entry: _Entry) -> None:
        worker_id = self._least_loaded("C")
        entry.stage = Stage.DECODE
        self._enter(entry, worker_id)
        self.executor.send(worker_id, Serve(entry.request))

    def _reserve(self, entry: _Entry) -> None:
        worker_id = self._least_loaded("D", entry.refused_by)
        entry.stage = Stage.RESERVING
        self._load[worker_id] += 1
        self.executor.send(worker_id, Reserve(entry.request))

    def _least_loaded(self, role: str, avoid: set[str] = frozenset()) -> str:  # type: ignore[assignment]
        candidates = [worker_id for worker_id, its_role in self.executor.roles.items() if its_role == role]
        return min(candidates, key=lambda worker_id: (worker_id in avoid, self._load[worker_id]))

    def _enter(self, entry: _Entry, worker_id: str) -> None:
        entry.timeline.path.append(worker_id)
        entry.timeline.mark(f"sent to {worker_id}")
        self._load[worker_id] += 1

    # --------------------------------------------------------------------------------------- taking in

    def _on_tokens(self, worker_id: str, message: Tokens) -> None:
        for event in message.events:
            entry = self._entries.get(event.request_id)
            if entry is None or event.index not in entry.open_answers:
                continue  # cancelled meanwhile
            self._events.append(event)
            if event.finish_reason is not None:
                entry.open_answers.discard(event.index)
                self._close_if_ended(event.request_id)

    def _on_refused(self, worker_id: str, message: Refused) -> None:
        self._load[worker_id] -= 1
        entry = self._entries.get(message.request_id)
        if entry is None:
            return
        entry.stage = Stage.QUEUED
        entry.timeline.num_refusals += 1
        entry.refused_by.add(worker_id)
        if len(entry.refused_by) == sum(role == "D" for role in self.executor.roles.values()):
            entry.refused_by.clear()

    def _on_granted(self, worker_id: str, message: Granted) -> None:
        entry = self._entries.get(message.request_id)
        if entry is None:  # cancelled meanwhile: nobody will write, nobody will read
            self._load[worker_id] -= 1
            self._release(message.destination, "request", "writer")
            return
        self._queue.remove(message.request_id)
        entry.timeline.mark(f"blocks granted by {worker_id}")
        entry.destination = message.destination
        entry.stage = Stage.PREFILL
        prefill_worker = self._least_loaded("P")
        self._enter(entry, prefill_worker)
        self.executor.send(prefill_worker, Prefill(entry.request, message.destination))

    def _on_prefilled(self, worker_id: str, message: Prefilled) -> None:
        self._load[worker_id] -= 1
        entry = self._entries.get(message.request_id)
        if entry is None:  # ended meanwhile, and the request side of the lease was given back then
            self._release(message.destination, "writer")
            return
        entry.timeline.mark("KV transferred")
        entry.stage = Stage.DECODE
        decode_worker = message.destination.worker_id
        entry.timeline.path.append(decode_worker)
        entry.timeline.mark(f"sent to {decode_worker}")
        written = [first for first in message.written
                   if first.finish_reason is not None or first.index in entry.open_answers]
        self.executor.send(decode_worker, Resume(entry.request, message.destination.lease_id, written))

    def _on_write_ended(self, worker_id: str, message: WriteEnded) -> None:
        self._load[worker_id] -= 1
        self._release(message.destination, "writer")

    def _close_if_ended(self, request_id: str) -> None:
        """Every answer has ended: forget the request, and give back what it holds on the decode worker."""
        entry = self._entries[request_id]
        if entry.open_answers:
            return
        del self._entries[request_id]
        entry.timeline.mark("finished")
        if entry.destination is not None:
            self._load[entry.destination.worker_id] -= 1
            if entry.stage is Stage.PREFILL:  # D has not adopted the lease; P says itself when it stops writing
                self._release(entry.destination, "request")
        elif entry.stage is Stage.DECODE:
            self._load[entry.timeline.path[-1]] -= 1
        if entry.stage is Stage.QUEUED or entry.stage is Stage.RESERVING:
            self._queue.remove(request_id)
        entry.stage = Stage.CLOSED

    def _release(self, destination: Destination, *holders: str) -> None:
        for holder in holders:
            self.executor.send(destination.worker_id, ReleaseLease(destination.lease_id, holder))
