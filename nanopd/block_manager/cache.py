"""The KV cache's tensors. Which block belongs to whom is the pool's affair; here are only the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanopd.config import ModelSpec
from nanopd.paged_attention import cuda
from nanopd.paged_attention.host import upload


class KVCache:
    """Keys and values of all layers, in `num_blocks` blocks of `block_size` tokens.

    `data` is [num_layers, 2, num_blocks, block_size, kv_heads, head_dim], keys before values. It starts
    uninitialised, and freed blocks keep their old content: readers must not look past what was written.

    A method that takes several blocks makes a fixed number of launches, however many blocks those are.
    """

    def __init__(self, spec: ModelSpec, num_blocks: int, block_size: int, device: torch.device | str,
                 dtype: torch.dtype) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (spec.num_layers, 2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        self.data = torch.empty(shape, device=device, dtype=dtype)

    @classmethod
    def of(cls, data: Tensor) -> KVCache:
        """A cache in memory that is there already, such as another worker's. `data` is shaped as above."""
        cache = cls.__new__(cls)
        cache.num_blocks, cache.block_size = data.shape[2:4]
        cache.data = data
        return cache

    @property
    def num_layers(self) -> int:
        return self.data.shape[0]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return self.data.nbytes // self.num_blocks

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values, [num_blocks, block_size, kv_heads, head_dim] each."""
        return self.data[index, 0], self.data[index, 1]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in all layers, as if every source were read before any write.

        No block may be the destination of two pairs.
        """
        if not pairs:
            return
        sources, destinations = self._index([source for source, _ in pairs]), self._index([target for _, target in pairs])
        if cuda.usable(self.data) and {source for source, _ in pairs}.isdisjoint(target for _, target in pairs):
            cuda.move_blocks(self.data, destinations, self.data, sources)
        else:
            self.data.index_copy_(2, destinations, self.data.index_select(2, sources))

    def copy_to(self, other: KVCache, layers: range, source_blocks: Sequence[int] | Tensor,
                destination_blocks: Sequence[int] | Tensor, max_thread_blocks: int = 0) -> None:
        """Copy blocks of some layers into another cache of the same shape per block, which the device can address.

        `max_thread_blocks` is as in `cuda.move_blocks`.
        """
        source, target = (cache.data[layers.start : layers.stop] for cache in (self, other))
        sources = self._index(source_blocks)
        if cuda.usable(self.data) and cuda.usable(other.data):
            cuda.move_blocks(target, self._index(destination_blocks), source, sources, max_thread_blocks)
        else:
            target.index_copy_(2, other._index(destination_blocks), source.index_select(2, sources).to(target.device))

    def gather(self, layer: int, block_ids: Sequence[int] | Tensor) -> Tensor:
        """A copy of n blocks of one layer: [2, n, block_size, kv_heads, head_dim]."""
        blocks = self.data.new_empty(1, 2, len(block_ids), *self.data.shape[3:])
        self.pack(range(layer, layer + 1), block_ids, blocks)
        return blocks[0]

    def scatter(self, layer: int, block_ids: Sequence[int] | Tensor, data: Tensor) -> None:
        """Write what `gather` gave to n blocks of one layer. `data` is on the cache's device, in its dtype."""
        self.unpack(range(layer, layer + 1), block_ids, data[None])

    def pack(self, layers: range, block_ids: Sequence[int] | Tensor, out: Tensor) -> None:
        """Copy n blocks of some layers, end to end, to `out`: [layers, 2, n, block_size, kv_heads, head_dim]."""
        source = self.data[layers.start : layers.stop]
        if cuda.usable(source):
            cuda.move_blocks(out, None, source, self._index(block_ids))
        else:
            torch.index_select(source, 2, self._index(block_ids), out=out)

    def unpack(self, layers: range, block_ids: Sequence[int] | Tensor, data: Tensor) -> None:
        """Write what `pack` gave to n blocks of some layers. `data` is on the cache's device, in its dtype."""
        target = self.data[layers.start : layers.stop]
        if cuda.usable(target):
            cuda.move_blocks(target, self._index(block_ids), data, None)
        else:
            target.index_copy_(2, self._index(block_ids), data)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given to do."""
        if self.data.is_cuda:
            torch.cuda.synchronize(self.data.device)

    def poison(self, block_ids: Sequence[int] | Tensor) -> None:
        """Fill blocks with NaN in all layers, so that whoever reads them shows it. For tests."""
        self.data.index_fill_(2, self._index(block_ids), float("nan"))

    def _index(self, block_ids: Sequence[int] | Tensor) -> Tensor:
        if isinstance(block_ids, Tensor):
            return block_ids.to(self.data.device, torch.int64)
        return upload(list(block_ids), self.data.device)
