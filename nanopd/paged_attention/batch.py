"""What attention has to know about a step, besides the tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class AttentionBatch:
    """R rows of new tokens, laid end to end: T tokens in all.

    Row r brings `query_lens[r]` new tokens: the last of the `context_lens[r]` tokens that it has in the cache
    once they are stored. A prefill chunk, a decode and a speculative verification differ only in these numbers.

    slot_mapping: int64 [T], where each new token's K and V go: block * block_size + offset in the block; a CUDA
        kernel leaves out what goes to -1, which marks padding
    block_tables: int32 [R, max_blocks], the blocks of each row in order, padded with any block there is
    query_lens: R numbers, at least 1 each, T in sum
    context_lens: R numbers, the new tokens included, so never below query_lens
    contexts, starts: int32 [R] and [R + 1], the context lengths and where each row's new tokens begin, for kernels to
        read. A CUDA graph is replayed with other contexts than it was recorded with; 0 marks a row of padding
    num_decodes: how many rows at the front have one new token each
    """

    slot_mapping: Tensor
    block_tables: Tensor
    query_lens: list[int]
    context_lens: list[int]
    contexts: Tensor | None = None
    starts: Tensor | None = None
    plan: Tensor | None = None  # how the decodes are split over the GPU: made once a step, used by all layers
    num_decodes: int = field(init=False)

    def __post_init__(self) -> None:
        lengths = self.query_lens
        self.num_decodes = next((row for row, length in enumerate(lengths) if length > 1), len(lengths))
