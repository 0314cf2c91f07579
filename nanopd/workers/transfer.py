"""Moving a prompt's KV cache to the worker that will decode it, layer by layer as it is computed."""

from __future__ import annotations

from typing import Protocol

from nanopd.block_manager.cache import KVCache
from nanopd.core import PlanRow
from nanopd.messages import Destination


class Transport(Protocol):
    """Copies blocks of one layer from this worker's cache into another's."""

    def send(self, layer: int, source_blocks: list[int], destination_blocks: list[int]) -> None: ...


class LocalTransport:
    """Both caches are tensors of this process on one device: gather, then scatter. Done when `send` returns."""

    def __init__(self, source: KVCache, destination: KVCache) -> None:
        self._source = source
        self._destination = destination

    def send(self, layer: int, source_blocks: list[int], destination_blocks: list[int]) -> None:
        self._destination.scatter(layer, destination_blocks, self._source.gather(layer, source_blocks))


class Transfer:
    """One prompt on its way. Each step sends what the destination lacks of the tokens computed so far.

    A block that a chunk leaves half full is sent again, fuller, with the next one.
    """

    def __init__(self, transport: Transport, destination: Destination, block_size: int) -> None:
        self.destination = destination
        self.num_sent = destination.num_cached  # tokens whose KV, in all layers, is at the destination
        self.blocks_sent = 0  # counted over all steps, one layer
        self._transport = transport
        self._block_size = block_size

    def send_layer(self, row: PlanRow, layer: int) -> None:
        """Send one layer of what the row's chunk has added."""
        blocks = self._blocks_to_send(row)
        if blocks:
            source, destination = row.block_table, self.destination.block_ids
            self._transport.send(layer, [source[i] for i in blocks], [destination[i] for i in blocks])

    def finish_step(self, row: PlanRow) -> None:
        """All layers of the row's chunk have been sent."""
        self.blocks_sent += len(self._blocks_to_send(row))
        self.num_sent = max(self.num_sent, row.num_cached + row.num_new)

    def _blocks_to_send(self, row: PlanRow) -> range:
        """Places in the block table."""
        computed = row.num_cached + row.num_new
        if computed <= self.num_sent:
            return range(0)
        return range(self.num_sent // self._block_size, -(-computed // self._block_size))
