"""Writing into another process's cache directly: over NVLink or PCIe between GPUs, in shared memory between CPUs."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor

from nanopd.block_manager.cache import KVCache
from nanopd.paged_attention.host import upload
from nanopd.workers.memory import DeviceMemory, HostMemory, MappedDeviceMemory
from nanopd.workers.transfer import Arrived, Ticket, TransferError

THREAD_BLOCKS = 64  # of the copy kernel, so that a prefill beside it keeps most of the GPU
BLOCK_LISTS = 64  # that are kept on the device: every layer of a chunk sends the same blocks
AT_ONCE = 50e-6  # seconds of looking at an event without a pause: a prompt's last layer is there before a sleep would end
FIRST_PAUSE, LONGEST_PAUSE = 50e-6, 2e-3  # seconds between two looks at an event


class PeerTransport:
    """The destination's cache is mapped into this process, and the source writes there; the other side does nothing.

    On a GPU one kernel on a stream of its own copies, behind an event of the stream that computes.
    """

    name = "peer"

    def __init__(self, source: KVCache, memory: HostMemory | DeviceMemory, shape: tuple[int, ...]) -> None:
        """`shape` is that of the destination's `data`. Raises TransferError where the memory can't be mapped."""
        device, dtype = source.data.device, source.data.dtype
        self._source = source
        self._mapped = MappedDeviceMemory(memory, device) if isinstance(memory, DeviceMemory) else None
        data = memory.map() if isinstance(memory, HostMemory) else self._mapped.data  # type: ignore[union-attr]
        self._destination: KVCache | None = KVCache.of(data.view(dtype).view(shape))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._index = lru_cache(BLOCK_LISTS)(lambda block_ids: upload(block_ids, device))

    def send(self, layers: range, source_blocks: list[int], destination_blocks: list[int]) -> Ticket:
        if self._destination is None:
            raise TransferError("the worker that it goes to is gone")
        if self._stream is None:
            self._source.copy_to(self._destination, layers, source_blocks, destination_blocks)
            return Arrived()
        computed = torch.cuda.current_stream(self._stream.device).record_event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            self._source.copy_to(self._destination, layers, self._on_device(source_blocks),
                                 self._on_device(destination_blocks), THREAD_BLOCKS)
            return EventTicket(self._stream)

    def close(self) -> None:
        """Unmap, once what was sent has been written. The other side must be alive or reaped, not about to end."""
        if self._destination is None:
            return
        self._destination = None
        self._index.cache_clear()
        if self._stream is not None:
            self._stream.synchronize()
        if self._mapped is not None:
            self._mapped.close()

    def _on_device(self, block_ids: list[int]) -> Tensor:
        return self._index(tuple(block_ids))  # of the copy stream's memory, so that it is reused in that stream's order


class EventTicket:
    """Arrived when all that a stream has been given so far is done. Waiting for it does not spin for long."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(blocking=True)
        self._event.record(stream)

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            self._event.synchronize()
            return True
        begin, pause = time.monotonic(), FIRST_PAUSE
        while not self._event.query():
            waited = time.monotonic() - begin
            left = timeout - waited
            if left <= 0:
                return False
            if waited < AT_ONCE:
                continue
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
        return True
