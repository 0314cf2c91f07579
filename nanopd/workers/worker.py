"""One worker: an engine with an inbox and an outbox. Its role is what it is asked to do, not another class."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nanopd.block_manager.cache import KVCache
from nanopd.block_manager.manager import Lease
from nanopd.core import Request, SequenceGroup, StepPlan, TokenEvent
from nanopd.engine.engine import Engine
from nanopd.messages import (
    Cancel,
    Destination,
    FirstToken,
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
from nanopd.workers.transfer import Transfer, Transport


class Worker:
    """Inbox -> schedule -> run -> transfers -> outbox, one step at a time.

    `connect(worker_id)` gives the transport from this worker's cache to that worker's.
    """

    def __init__(self, worker_id: str, role: str, engine: Engine, cache: KVCache,
                 connect: Callable[[str], Transport]) -> None:
        self.worker_id = worker_id
        self.role = role
        self.engine = engine
        self.cache = cache
        self.inbox: deque[ToWorker] = deque()
        self.outbox: deque[FromWorker] = deque()
        self.transfers: dict[str, Transfer] = {}
        self._connect = connect
        self._leases: dict[int, tuple[Lease, Request]] = {}  # granted and not adopted
        engine.layer_hook = self._send_layer
        self._handlers: dict[type, Callable] = {
            Serve: self._serve, Reserve: self._reserve, Prefill: self._prefill, Resume: self._resume,
            ReleaseLease: self._release_lease, Cancel: self._cancel,
        }

    @property
    def manager(self):
        """The worker's block manager."""
        return self.engine.scheduler.manager

    @property
    def has_work(self) -> bool:
        return bool(self.inbox) or self.engine.has_work

    def step(self) -> None:
        """Read the inbox, run one step of the engine, pass on what came of it."""
        while self.inbox:
            message = self.inbox.popleft()
            self._handlers[type(message)](message)
        events = self.engine.step()
        if events:
            self._emit(events)
        self._finish_transfers()

    # ------------------------------------------------------------------------------------------ handlers

    def _serve(self, message: Serve) -> None:
        self.engine.add(message.request)

    def _reserve(self, message: Reserve) -> None:
        request = message.request
        lease = self.manager.grant_lease(request.prompt_token_ids) if self._has_seats(request) else None
        if lease is None:
            self.outbox.append(Refused(request.request_id))
            return
        self._leases[lease.lease_id] = (lease, request)
        destination = Destination(self.worker_id, lease.lease_id, list(lease.block_ids), lease.num_cached)
        self.outbox.append(Granted(request.request_id, destination))

    def _has_seats(self, request: Request) -> bool:
        """Those that were preempted go first, and a lease granted must find room in the batch."""
        scheduler = self.engine.scheduler
        leased = sum(other.num_answers for lease, other in self._leases.values() if "request" in lease.holders)
        seats = scheduler.num_seats_taken + leased + request.num_answers
        return not scheduler.waiting and seats <= scheduler.config.max_num_seqs

    def _prefill(self, message: Prefill) -> None:
        transport = self._connect(message.destination.worker_id)
        transfer = Transfer(transport, message.destination, self.manager.block_size)
        self.transfers[message.request.request_id] = transfer
        self.engine.add(message.request, handoff=True)

    def _resume(self, message: Resume) -> None:
        lease, _ = self._leases.pop(message.lease_id)
        group = SequenceGroup.resume(message.request, [
            (first.index, first.token_id, first.logprob) for first in message.first_tokens])
        for sequence, first in zip(group.sequences, message.first_tokens, strict=True):
            if first.finish_reason is not None:
                sequence.finish(first.finish_reason)
        self.engine.scheduler.adopt(group, lease)
        self.manager.release_lease(lease, "writer")

    def _release_lease(self, message: ReleaseLease) -> None:
        lease, _ = self._leases[message.lease_id]
        self.manager.release_lease(lease, message.holder)
        if not lease.holders:
            del self._leases[message.lease_id]

    def _cancel(self, message: Cancel) -> None:
        self._emit(self.engine.cancel(message.request_id, message.index))
        self._end_writes()

    # ----------------------------------------------------------------------------------------- transfers

    def _send_layer(self, plan: StepPlan, layer: int) -> None:
        for row in plan.rows:
            transfer = self.transfers.get(row.request.request_id)
            if transfer is None:
                continue
            transfer.send_layer(row, layer)
            if layer == self.cache.data.shape[0] - 1:
                transfer.finish_step(row)

    def _finish_transfers(self) -> None:
        """Report the prompts that are done and arrived, and let their blocks here go."""
        scheduler = self.engine.scheduler
        for request_id in list(scheduler.handed_off):
            first_tokens = [
                FirstToken(sequence.index, sequence.token_ids[-1], sequence.logprobs[-1], sequence.finish_reason)
                for sequence in scheduler.first_tokens(request_id)]
            self.outbox.append(Prefilled(request_id, self.transfers.pop(request_id).destination, first_tokens))
            scheduler.release_handed_off(request_id)
        self._end_writes()

    def _end_writes(self) -> None:
        """Requests that ended here, by their first token, a fault or a cancel, leave leases to be given back."""
        ended = [request_id for request_id in self.transfers if self.engine.scheduler.find(request_id) is None]
        for request_id in ended:
            self.outbox.append(WriteEnded(request_id, self.transfers.pop(request_id).destination))

    def _emit(self, events: list[TokenEvent]) -> None:
        if events:
            self.outbox.append(Tokens(events))
