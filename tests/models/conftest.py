"""Runs a decoder over rows of tokens, as an engine would, in a cache whose unused slots are NaN."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from nanopd.block_manager.cache import KVCache
from nanopd.models.decoder import Decoder
from nanopd.paged_attention.ops import AttentionBatch


@dataclass
class CachedDecoder:
    """Sequences by number; each gets its blocks, in a scattered order, as it grows."""

    decoder: Decoder
    block_size: int = 4
    num_blocks: int = 64
    tables: dict[int, list[int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weight = self.decoder.norm.weight
        self.cache = KVCache(self.decoder.spec, self.num_blocks, self.block_size, weight.device, weight.dtype)
        self.cache.poison(range(self.num_blocks))
        self.free = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(1)).tolist()

    def run(self, rows: dict[int, list[int]], on_layer=None) -> torch.Tensor:
        """One step: new tokens of each sequence -> float32 logits of all of them, row after row."""
        slots, positions, contexts = [], [], []
        for sequence, tokens in rows.items():
            start = self.lengths.get(sequence, 0)
            end = self.lengths[sequence] = start + len(tokens)
            table = self.tables.setdefault(sequence, [])
            while len(table) * self.block_size < end:
                table.append(self.free.pop())
            positions += range(start, end)
            slots += [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, end)]
            contexts.append(end)
        width = max(len(self.tables[sequence]) for sequence in rows)
        tables = [self.tables[sequence] + [0] * (width - len(self.tables[sequence])) for sequence in rows]
        batch = AttentionBatch(torch.tensor(slots), torch.tensor(tables, dtype=torch.int32),
                               [len(tokens) for tokens in rows.values()], contexts)
        ids = torch.tensor([token for tokens in rows.values() for token in tokens])
        return self.decoder.logits(self.decoder(ids, torch.tensor(positions), self.cache, batch, on_layer))


@pytest.fixture
def cached():
    """CachedDecoder, the class: `cached(decoder, block_size=4)`."""
    return CachedDecoder


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Threads only wait for one another on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
