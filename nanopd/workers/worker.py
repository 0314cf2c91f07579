"""One worker: an engine with an inbox and an outbox. Its role is what it is asked to do, not another class."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from nanopd.block_manager.manager import Lease
from nanopd.core import PlanRow, Request, SequenceGroup, StepPlan, TokenEvent, TransferRecord
from nanopd.engine.engine import Engine, OnLayer
from nanopd.messages import (
    AskHistory,
    AskStatus,
    Cancel,
    Corrupted,
    Destination,
    FromWorker,
    Granted,
    History,
    LinkTimed,
    Ping,
    Pong,
    Prefill,
    Prefilled,
    Refused,
    ReleaseLease,
    Reserve,
    Resume,
    Serve,
    SetRole,
    Status,
    TimeLink,
    Tokens,
    ToWorker,
    TransferFailed,
    WriteEnded,
    Written,
)
from nanopd.workers.transfer import Transfer, TransferError, Transport, time_sends

if TYPE_CHECKING:  # a worker without tensors, as the simulator has, runs without torch
    from nanopd.block_manager.cache import KVCache

TRANSFERS_KEPT = 4096
PATIENCE = 0.005  # seconds to wait for the last layers of a prompt just computed, rather than a whole step


class Worker:
    """Inbox -> schedule -> run -> transfers -> outbox, one step at a time.

    Args:
        connect: connect(worker_id) gives the transport from this worker's cache to that worker's. Raises TransferError.
        checksums: send with each prompt the checksum of its KV, for the receiver to compare.
    """

    def __init__(self, worker_id: str, role: str, engine: Engine, cache: KVCache,
                 connect: Callable[[str], Transport], checksums: bool = False) -> None:
        self.worker_id = worker_id
        self.role = role
        self.engine = engine
        self.cache = cache
        self.inbox: deque[ToWorker] = deque()
        self.outbox: deque[FromWorker] = deque()
        self.transfers: dict[str, Transfer] = {}
        self.sent: deque[TransferRecord] = deque(maxlen=TRANSFERS_KEPT)
        self._connect = connect
        self._checksums = checksums
        self._leases: dict[int, tuple[Lease, Request]] = {}  # granted and not adopted
        self.on_handover: Callable[[], None] = lambda: None  # may carry the outbox away, before what is left to do here
        engine.layer_hook = self._on_layer
        self._handlers: dict[type, Callable] = {
            Serve: self._serve, Reserve: self._reserve, Prefill: self._prefill, Resume: self._resume,
            ReleaseLease: self._release_lease, Cancel: self._cancel, TimeLink: self._time_link, SetRole: self._set_role,
            Ping: self._pong, AskStatus: self._tell_status, AskHistory: self._tell_history,
        }

    @property
    def manager(self):
        """The worker's block manager."""
        return self.engine.scheduler.manager

    @property
    def has_work(self) -> bool:
        return bool(self.inbox) or self.engine.has_work or bool(self.transfers)

    def step(self) -> None:
        """Read the inbox, run one step of the engine, pass on what came of it.

        Whoever carries the outbox away does so after the step: blocks granted in it are then out of every step's reach.
        """
        if self.inbox:
            self.engine.quiesce()  # before any message: some grant blocks, and an interrupt here must lose none
        while self.inbox:
            message = self.inbox.popleft()
            self._handlers[type(message)](message)
        self._emit(self.engine.step())
        self.finish_transfers()

    def status(self) -> Status:
        """How the worker is doing."""
        scheduler = self.engine.scheduler
        return Status(
            self.role, os.getpid(), self.manager.num_blocks, self.manager.num_free_blocks, len(scheduler.waiting),
            len(scheduler.running), len(self._leases), len(self.transfers))

    def history(self, since: float = 0.0) -> History:
        """What the worker has done lately, of that what began at `since` or later."""
        return History([step for step in self.engine.history if step.start >= since],
                       [sent for sent in self.sent if sent.start >= since])

    # ------------------------------------------------------------------------------------------ handlers

    def _serve(self, message: Serve) -> None:
        request = message.request
        self.engine.add_group(_resumed(request, message.written) if message.written else SequenceGroup(request))

    def _reserve(self, message: Reserve) -> None:
        request = message.request
        lease = self.manager.grant_lease(request.prompt_token_ids) if self._has_room(request) else None
        if lease is None:
            self.outbox.append(Refused(request.request_id))
            return
        self._leases[lease.lease_id] = (lease, request)
        self._promise_seats()
        destination = Destination(self.worker_id, lease.lease_id, list(lease.block_ids), lease.num_cached)
        self.outbox.append(Granted(request.request_id, destination))

    def _has_room(self, request: Request) -> bool:
        """Those that wait here go first, and a lease granted must find room in the batch."""
        scheduler = self.engine.scheduler
        return (not scheduler.lacks_blocks
                and scheduler.num_seats_wanted + request.num_answers <= scheduler.config.max_num_seqs)

    def _promise_seats(self) -> None:
        self.engine.scheduler.num_seats_promised = sum(
            request.num_answers for lease, request in self._leases.values() if "request" in lease.holders)

    def _prefill(self, message: Prefill) -> None:
        request_id, destination = message.request.request_id, message.destination
        try:
            transport = self._connect(destination.worker_id)
        except TransferError as error:
            self.outbox.append(TransferFailed(request_id, destination, str(error)))
            return
        self.transfers[request_id] = Transfer(transport, destination, self.manager.block_size, self.cache.num_layers,
                                              self.engine.clock)
        self.engine.add_group(SequenceGroup(message.request, handoff=True))

    def _resume(self, message: Resume) -> None:
        lease, request = self._leases.pop(message.lease_id)
        self._promise_seats()
        if message.checksum is not None and message.checksum != self._checksum(request, lease.block_ids, lease.num_cached):
            self.manager.release_lease(lease, "request")
            self.manager.release_lease(lease, "writer")
            self.outbox.append(Corrupted(message.request_id))
            return
        self.engine.scheduler.adopt(_resumed(request, message.written), lease)
        self.manager.release_lease(lease, "writer")

    def _release_lease(self, message: ReleaseLease) -> None:
        lease, _ = self._leases[message.lease_id]
        self.manager.release_lease(lease, message.holder)
        if not lease.holders:
            del self._leases[message.lease_id]
        self._promise_seats()

    def _cancel(self, message: Cancel) -> None:
        self._emit(self.engine.cancel(message.request_id, message.index))

    def _time_link(self, message: TimeLink) -> None:
        """Nothing else happens here meanwhile."""
        destination = message.destination
        blocks = destination.block_ids[destination.num_cached // self.manager.block_size :]
        try:
            transport = self._connect(destination.worker_id)
            sends = time_sends(transport, self.cache, blocks, self.engine.clock)
        except TransferError as error:
            self.outbox.append(TransferFailed(message.request_id, destination, str(error)))
        else:
            self.outbox.append(LinkTimed(message.request_id, destination, transport.name, sends))

    def _set_role(self, message: SetRole) -> None:
        self.role = message.role

    def _pong(self, message: Ping) -> None:
        self.outbox.append(Pong())

    def _tell_status(self, message: AskStatus) -> None:
        self.outbox.append(self.status())

    def _tell_history(self, message: AskHistory) -> None:
        self.outbox.append(self.history(message.since))

    # ----------------------------------------------------------------------------------------- transfers

    def _on_layer(self, plan: StepPlan) -> OnLayer | None:
        rows = [row for row in plan.rows if row.request.request_id in self.transfers]
        return partial(self._send_layer, rows) if rows else None

    def _send_layer(self, rows: list[PlanRow], layer: int) -> None:
        for row in rows:
            transfer = self.transfers.get(row.request.request_id)
            if transfer is not None:
                transfer.send_layer(row, layer)

    def finish_transfers(self, patience: float = 0.0) -> None:
        """Report the prompts that are done and arrived, and let their blocks here go. Waits for those that are done and on
        their way at most `patience` seconds in all.

        Also requests that ended here, by their first token, a fault or a cancel: they leave leases to be given back, as
        soon as nobody writes there any more.
        """
        now = self.engine.clock()
        deadline = now + patience
        for request_id, transfer in list(self.transfers.items()):
            handed_off = request_id in self.engine.scheduler.handed_off
            if not handed_off and self.engine.scheduler.find(request_id) is not None:
                continue  # its prompt is being computed
            transfer.computed = now if transfer.computed is None else transfer.computed
            try:
                if not transfer.arrived(max(0.0, deadline - self.engine.clock())):
                    continue
            except TransferError as error:
                self._give_up(request_id, str(error))
                continue
            del self.transfers[request_id]
            if handed_off:
                self._hand_over(request_id, transfer)
            else:
                self.outbox.append(WriteEnded(request_id, transfer.destination))

    def _hand_over(self, request_id: str, transfer: Transfer) -> None:
        scheduler = self.engine.scheduler
        sequences = scheduler.first_tokens(request_id)
        total = None
        if self._checksums:
            group = scheduler.handed_off[request_id]
            total = self._checksum(group.request, self.manager.block_table(group.live[0]), transfer.destination.num_cached)
        record = transfer.record(request_id, self.cache.bytes_per_block)
        self.outbox.append(Prefilled(request_id, transfer.destination, [
            Written(sequence.index, sequence.output_token_ids, sequence.logprobs, sequence.finish_reason)
            for sequence in sequences], total))
        self.on_handover()
        self.sent.append(record)
        scheduler.release_handed_off(request_id)

    def _give_up(self, request_id: str, error: str) -> None:
        self.engine.cancel(request_id)
        self.outbox.append(TransferFailed(request_id, self.transfers.pop(request_id).destination, error))

    def _checksum(self, request: Request, block_ids: list[int], num_cached: int) -> int:
        """Of what travelled. The first `num_cached` tokens were at the destination: in other batches, or by another worker,
        computed to slightly other values."""
        from nanopd.workers.checksum import checksum  # only here are there tensors

        first = num_cached // self.manager.block_size
        num_tokens = len(request.prompt_token_ids) - first * self.manager.block_size
        return checksum(self.cache, block_ids[first:], num_tokens)

    def _emit(self, events: list[TokenEvent]) -> None:
        if events:
            self.outbox.append(Tokens(events))


def _resumed(request: Request, written: list[Written]) -> SequenceGroup:
    group = SequenceGroup.resume(request, [(answer.index, answer.token_ids, answer.logprobs) for answer in written])
    for sequence, answer in zip(group.sequences, written, strict=True):
        if answer.finish_reason is not None:
            sequence.finish(answer.finish_reason)
    return group
