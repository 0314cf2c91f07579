"""The two operations the models call. Here is chosen what carries them out."""

from __future__ import annotations

from torch import Tensor

from nanopd.paged_attention import reference
from nanopd.paged_attention.batch import AttentionBatch

__all__ = ["AttentionBatch", "paged_attention", "store_kv"]


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write new tokens' keys and values, [T, kv_heads, head_dim] each, to their slots in the cache.

    The caches are [num_blocks, block_size, kv_heads, head_dim]; `slot_mapping` is int64 [T].
    """
    reference.store_kv(key, value, key_cache, value_cache, slot_mapping)


def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch,
                    scale: float) -> Tensor:
    """Causal attention of [T, heads, head_dim] queries over their rows' cached tokens; same shape back.

    The new tokens' own keys and values must be stored already. New token j of a row sees all tokens cached
    before the row's new ones, and the new ones up to itself. Query heads share KV heads in equal groups.
    """
    return reference.paged_attention(query, key_cache, value_cache, batch, scale)
