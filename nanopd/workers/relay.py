"""Through host memory that both processes map: for GPUs that can't reach each other, and for CPUs."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

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
from nanopd.workers.memory import HostMemory, Pinned, SharedMemory


class Ring:
    """One process's side of the slots: shared memory, pinned for this side's GPU, and as much room there as a slot has.

    On a GPU a kernel gathers scattered blocks into the room, from where one copy fills the slot, or the other way round.
    """

    def __init__(self, memory: Tensor, cache: KVCache) -> None:
        self._slots = memory.view(SLOTS, -1)
        self._cache = cache
        self._room: Tensor | None = None
        self._pinned: Pinned | None = None
        if cache.data.is_cuda:
            self._pinned = Pinned(memory, cache.data.device)
            self._room = torch.empty(self._slots.shape[1], dtype=torch.uint8, device=cache.data.device)

    def pack(self, layers: range, block_ids: list[int], slot: int) -> None:
        """From the cache to a slot, as soon as the current stream has come so far."""
        blocks = view_blocks(self._slots[slot], self._cache, layers, len(block_ids))
        if self._room is None:
            self._cache.pack(layers, block_ids, blocks)
            return
        gathered = view_blocks(self._room, self._cache, layers, len(block_ids))
        self._cache.pack(layers, block_ids, gathered)
        blocks.copy_(gathered, non_blocking=True)

    def unpack(self, layers: range, block_ids: list[int], slot: int) -> None:
        """From a slot to the cache, as soon as the current stream has come so far."""
        blocks = view_blocks(self._slots[slot], self._cache, layers, len(block_ids))
        if self._room is not None:
            blocks = view_blocks(self._room, self._cache, layers, len(block_ids)).copy_(blocks, non_blocking=True)
        self._cache.unpack(layers, block_ids, blocks)

    def close(self) -> None:
        if self._pinned is not None:
            self._pinned.close()
        self._room = None
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
        if piece.computed is not None:
            self._work.stream.wait_event(piece.computed)  # type: ignore[union-attr]
        self._ring.pack(piece.layers, piece.source_blocks, slot)
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
