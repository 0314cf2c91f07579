"""What attention has to know about a step, besides the tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class AttentionBatch:
    """R rows of new tokens, laid end to end: T tokens in all.

    Row r brings `query_lens[r]` new tokens: the last of the `context_lens[r]` tokens that it has in the cache
    once they are stored. A prefill chunk, a decode and a speculative verification differ only in these numbers.

    slot_mapping: int64 [T], where each new token's K and V go: block * block_size + offset in the block
    block_tables: int32 [R, max_blocks], the blocks of each row in order, padded with 0
    query_lens: R numbers, at least 1 each, T in sum
    context_lens: R numbers, the new tokens included, so never below query_lens
    """

    slot_mapping: Tensor
    block_tables: Tensor
    query_lens: list[int]
    context_lens: list[int]
