"""By torch.distributed: gloo between CPUs, NCCL between GPUs. For processes that share no memory."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nanopd.block_manager.cache import KVCache
from nanopd.workers.channel import (
    SLOTS,
    Arrival,
    Door,
    Hello,
    Piece,
    Receiver,
    TwoSidedTransport,
    await_welcome,
    knock,
    slot_bytes_for,
    view_blocks,
)
from nanopd.workers.network import ANSWER_TIME, LOOPBACK
from nanopd.workers.transfer import TransferError

SENDER, RECEIVER = 0, 1


@dataclass(frozen=True)
class Meeting:
    """Where the two find each other."""

    address: tuple[str, int]
    device_type: str


class CollectiveTransport(TwoSidedTransport):
    """A process group of two, apart from any other in these processes."""

    name = "collective"

    def __init__(self, source: KVCache, door: Door, source_id: str, destination_id: str, address: str = LOOPBACK) -> None:
        """`address` is this machine's. Raises TransferError where the other side does not let us in."""
        slot_bytes, device = slot_bytes_for(source), source.data.device
        self._slots = torch.empty(SLOTS, slot_bytes, dtype=torch.uint8, device=device)
        self._sends: list[dist.Work | None] = [None] * SLOTS
        store = _open_store(address)
        hello = Hello(source_id, destination_id, self.name, slot_bytes, Meeting((address, store.port), device.type))
        connection = knock(door, hello)
        try:
            self._group = _meet(store, SENDER, device, address)
        except RuntimeError as error:
            await_welcome(connection, hello)  # the other side may have said why
            connection.close()
            raise TransferError(f"no process group with worker {destination_id}: {error}") from error
        await_welcome(connection, hello)
        super().__init__(source, connection, slot_bytes)

    def _load(self, piece: Piece, slot: int) -> torch.cuda.Event | None:
        if piece.computed is not None:
            self._work.stream.wait_event(piece.computed)  # type: ignore[union-attr]
        blocks = view_blocks(self._slots[slot], self._source, piece.layers, len(piece.source_blocks))
        self._source.pack(piece.layers, piece.source_blocks, blocks)
        self._sends[slot] = self._group.send([blocks.view(torch.uint8).flatten()], RECEIVER, 0)
        return None  # the other end may start to receive at once; what it has stored has been sent

    def _abandon(self) -> None:
        with suppress(RuntimeError):
            self._group.abort()

    def _release(self) -> None:
        self._sends.clear()
        del self._group, self._slots


class CollectiveReceiver(Receiver):
    def __init__(self, cache: KVCache, slot_bytes: int, meeting: Meeting, address: str = LOOPBACK) -> None:
        super().__init__(cache)
        device = cache.data.device
        if device.type != meeting.device_type:
            raise TransferError(f"one cache is on a {meeting.device_type} device, the other on a {device.type} one: use the relay")
        self._slots = torch.empty(SLOTS, slot_bytes, dtype=torch.uint8, device=device)
        store = dist.TCPStore(*meeting.address, 2, is_master=False, timeout=timedelta(seconds=ANSWER_TIME))
        self._group = _meet(store, RECEIVER, device, address)

    def abandon(self) -> None:
        with suppress(RuntimeError):
            self._group.abort()

    def _store(self, arrival: Arrival) -> torch.cuda.Event | None:
        blocks = view_blocks(self._slots[arrival.slot], self._cache, arrival.layers, len(arrival.block_ids))
        self._group.recv([blocks.view(torch.uint8).flatten()], SENDER, 0).wait()  # on a GPU, its stream waits
        self._cache.unpack(arrival.layers, arrival.block_ids, blocks)
        return self._work.record()

    def _release(self) -> None:
        del self._slots


def _open_store(address: str) -> dist.TCPStore:
    """One that listens on this address alone: left to itself it listens on all."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(address, port, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_TIME),
                         master_listen_fd=listener.detach())


def _meet(store: dist.Store, rank: int, device: torch.device, address: str) -> dist.Backend:
    """A group of two that has exchanged its first bytes: what connects them is made at the first exchange."""
    timeout = timedelta(seconds=ANSWER_TIME)
    if device.type == "cuda":
        # a peer that dies is heard of on the other connection; torch's own watch would end this process as well
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(store, rank, 2, options)
    else:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timeout
        group = dist.ProcessGroupGloo(store, rank, 2, options)
    greeting = torch.zeros(1, dtype=torch.uint8, device=device)
    exchange = group.send([greeting], RECEIVER, 0) if rank == SENDER else group.recv([greeting], SENDER, 0)
    exchange.wait()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return group
