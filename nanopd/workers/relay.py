"""Through host memory that both processes map: for GPUs that can't reach each other, and for CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from nanopd.block_manager.cache import KVCache
from nanopd.paged_attention.host import upload
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
from nanopd.workers.memory import HostMemory, Pinned, SharedMemory

ROOMS = 2  # of which slots have one in turn


class Room:
    """Memory of a GPU for as much as a slot holds. One stream fills it, ahead of the current one, which empties it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._emptied = torch.cuda.Event()  # until it is first recorded, nobody waits for it

    @contextmanager
    def filled_by(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """A context in which torch works on that stream, once the room is empty. Behind it the current stream waits."""
        stream.wait_event(self._emptied)
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def empty(self) -> None:
        """When the current stream has come so far."""
        self._emptied.record()


class Ring:
    """One process's side of the slots: shared memory, and pinned for this side's GPU if it has one.

    On a GPU a kernel gathers scattered blocks into a room there, from where one copy fills the slot, or the other way
    round. Of two rooms and two streams one is copied while the other is gathered or scattered, so that copies follow each
    other closely.
    """

    def __init__(self, memory: Tensor, cache: KVCache) -> None:
        self._slots = memory.view(SLOTS, -1)
        self._cache = cache
        self._rooms: list[Room] = []
        self._pinned: Pinned | None = None
        if cache.data.is_cuda:
            device = cache.data.device
            self._pinned = Pinned(memory, device)
            self._rooms = [Room(self._slots.shape[1], device) for _ in range(ROOMS)]
            self._ahead = torch.cuda.Stream(device)

    def pack(self, layers: range, block_ids: list[int], slot: int, computed: torch.cuda.Event | None) -> None:
        """From the cache to a slot, as soon as `computed` has passed and the current stream has come so far."""
        blocks = view_blocks(self._slots[slot], self._cache, layers, len(block_ids))
        if not self._rooms:
            self._cache.pack(layers, block_ids, blocks)
            return
        room = self._rooms[slot % ROOMS]
        gathered = view_blocks(room.memory, self._cache, layers, len(block_ids))
        with room.filled_by(self._ahead):
            self._ahead.wait_event(computed)  # type: ignore[arg-type]
            self._cache.pack(layers, block_ids, gathered)
        blocks.copy_(gathered, non_blocking=True)
        room.empty()

    def unpack(self, layers: range, block_ids: list[int], slot: int) -> None:
        """From a slot to the cache, as soon as the current stream has come so far."""
        blocks = view_blocks(self._slots[slot], self._cache, layers, len(block_ids))
        if not self._rooms:
            self._cache.unpack(layers, block_ids, blocks)
            return
        room = self._rooms[slot % ROOMS]
        gathered = view_blocks(room.memory, self._cache, layers, len(block_ids))
        with room.filled_by(self._ahead):
            index = upload(block_ids, self._cache.data.device)  # later it would stand in line behind the next piece's copy
            gathered.copy_(blocks, non_blocking=True)
        index.record_stream(torch.cuda.current_stream())
        self._cache.unpack(layers, index, gathered)
        room.empty()

    def close(self) -> None:
        if self._pinned is not None:
            self._ahead.synchronize()
            self._pinned.close()
        self._rooms.clear()
        self._slots = torch.empty(0, dtype=torch.uint8)


class PinnedRelayTransport(TwoSidedTransport):
    """GPU to host here, host to GPU there, both at once in different slots."""

    name = "relay"

    def __init__(self, source: KVCache, door: Door, source_id: str, destination_id: str) -> None:
        """Raises TransferError where the other side does not let us in."""
        slot_bytes = slot_bytes_for(source)
        with ExitStack() as undo:
            self._shared = SharedMemory(SLOTS * slot_bytes)
            undo.callback(self._shared.close)
            self._ring = Ring(self._shared.data, source)
            undo.callback(self._ring.close)
            hello = Hello(source_id, destination_id, self.name, slot_bytes, self._shared.address)
            connection = knock(door, hello)
            await_welcome(connection, hello)
            undo.pop_all()
        super().__init__(source, connection, slot_bytes)

    def _load(self, piece: Piece, slot: int) -> torch.cuda.Event | None:
        self._ring.pack(piece.layers, piece.source_blocks, slot, piece.computed)
        return self._work.record()

    def _abandon(self) -> None:
        pass  # loading waits for nobody

    def _release(self) -> None:
        self._ring.close()
        self._shared.close()


class RelayReceiver(Receiver):
    def __init__(self, cache: KVCache, memory: HostMemory) -> None:
        super().__init__(cache)
        self._ring = Ring(memory.map(), cache)

    def _store(self, arrival: Arrival) -> torch.cuda.Event | None:
        self._ring.unpack(arrival.layers, arrival.block_ids, arrival.slot)
        return self._work.record()

    def abandon(self) -> None:
        pass  # nor does storing

    def _release(self) -> None:
        self._ring.close()
