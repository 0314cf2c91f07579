"""Moving a prompt's KV cache to the worker that will decode it, layer by layer as it is computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from nanopd.core import PlanRow, TransferRecord
from nanopd.messages import Destination

if TYPE_CHECKING:  # a worker without tensors, as the simulator has, runs without torch
    from nanopd.block_manager.cache import KVCache

SEND_TOKENS = 4096  # tokens of a send, counted in each of its layers; fewer take as long to launch as to travel
TIMES = 8  # that sends of a size are timed
TIMED_FOR = 0.15  # seconds after which a size has been timed often enough


class TransferError(RuntimeError):
    """Blocks can't be brought to their destination. The message says why."""


class Ticket(Protocol):
    """Blocks on their way, and all that was sent before them."""

    def wait(self, timeout: float | None = None) -> bool:
        """Whether all have arrived; waits for it at most `timeout` seconds. Raises TransferError if they never will."""


class Transport(Protocol):
    """Copies blocks from this worker's cache into one other's. What was sent first arrives first."""

    name: str

    def send(self, layers: range, source_blocks: list[int], destination_blocks: list[int]) -> Ticket:
        """Queue blocks of some layers, behind all that the device has been given to compute so far.

        A fixed number of launches, however many blocks those are. Never waits for the device or for the other worker.
        Raises TransferError where the other worker is known to be gone.
        """

    def close(self) -> None: ...


class Arrived:
    """A ticket for what has arrived already."""

    def wait(self, timeout: float | None = None) -> bool:
        return True


class LocalTransport:
    """Both caches are tensors of this process, and one kernel, or the CPU, copies from the one to the other."""

    name = "local"

    def __init__(self, source: KVCache, destination: KVCache) -> None:
        self._source = source
        self._destination = destination

    def send(self, layers: range, source_blocks: list[int], destination_blocks: list[int]) -> Ticket:
        self._source.copy_to(self._destination, layers, source_blocks, destination_blocks)
        return Arrived()  # on one device, whoever reads them is queued later

    def close(self) -> None:
        pass


def time_sends(transport: Transport, cache: KVCache, destination_blocks: list[int],
               clock: Callable[[], float] = time.monotonic) -> list[tuple[int, float]]:
    """How long sends of several sizes take, one at a time: (bytes, seconds), the first of each size for warming up.

    One layer of a block, then whole blocks, one and four times as many each time, up to as many as there are. What is in this
    worker's blocks is of no account.

    Raises TransferError where something can't be sent.
    """
    most = min(len(destination_blocks), cache.num_blocks)
    counts = [4**i for i in range(most.bit_length()) if 4**i < most] + [most]
    sends = []
    for num_layers, count in [(1, 1), *((cache.num_layers, count) for count in counts)]:
        num_bytes = count * cache.bytes_per_block * num_layers // cache.num_layers
        begin, times = clock(), 0
        while times < 2 or (times < TIMES and clock() - begin < TIMED_FOR):
            start = clock()
            transport.send(range(num_layers), _spread(count, cache.num_blocks), destination_blocks[:count]).wait()
            cache.synchronize()  # on one device a copy counts as arrived when it is queued
            sends.append((num_bytes, clock() - start))
            times += 1
    return sends


def _spread(count: int, num_blocks: int) -> list[int]:
    """Blocks that do not lie side by side where there is room between them."""
    return [i * num_blocks // count for i in range(count)]


class Transfer:
    """One prompt on its way. Each step sends what the destination lacks of the tokens computed so far.

    A block that a chunk leaves half full is sent again, fuller, with the next one.
    """

    def __init__(self, transport: Transport, destination: Destination, block_size: int, num_layers: int,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.destination = destination
        self.num_sent = destination.num_cached  # tokens whose KV, in all layers, is on its way or there
        self.blocks_sent = 0  # counted over all steps, one layer
        self.start: float | None = None  # seconds, by the clock: when the first blocks were sent
        self.computed: float | None = None  # when the prompt's last step had ended
        self._transport = transport
        self._block_size = block_size
        self._num_layers = num_layers
        self._clock = clock
        self._ticket: Ticket = Arrived()
        self._error: TransferError | None = None  # what kept blocks from being sent

    def send_layer(self, row: PlanRow, layer: int) -> None:
        """Send what the row's chunk has added to one layer; of a short chunk several layers, with the last of them.

        What keeps it from being sent is for `arrived` to raise: the step, with other rows in it, goes on.
        """
        blocks = self._blocks_to_send(row)
        is_last = layer == self._num_layers - 1
        layers = range(layer - layer % -(-SEND_TOKENS // row.num_new), layer + 1)
        if blocks and (is_last or len(layers) * row.num_new >= SEND_TOKENS):
            source, destination = row.block_table, self.destination.block_ids
            self.start = self._clock() if self.start is None else self.start
            try:
                self._ticket = self._transport.send(layers, [source[i] for i in blocks], [destination[i] for i in blocks])
            except TransferError as error:
                self._error = self._error or error
        if is_last:
            self.blocks_sent += len(blocks)
            self.num_sent = max(self.num_sent, row.num_cached + row.num_new)

    def arrived(self, timeout: float) -> bool:
        """Whether all that was sent has arrived; waits at most `timeout` seconds. Raises TransferError."""
        if self._error is not None:
            raise self._error
        return self._ticket.wait(timeout)

    def record(self, request_id: str, bytes_per_block: int) -> TransferRecord:
        """What there is to say about it once it has arrived."""
        now = self._clock()
        start, computed = (now if when is None else when for when in (self.start, self.computed))
        return TransferRecord(
            request_id, self.destination.worker_id, self._transport.name, self.num_sent - self.destination.num_cached,
            self.blocks_sent * bytes_per_block, start, computed, now)

    def _blocks_to_send(self, row: PlanRow) -> range:
        """Places in the block table."""
        computed = row.num_cached + row.num_new
        if computed <= self.num_sent:
            return range(0)
        return range(self.num_sent // self._block_size, -(-computed // self._block_size))
