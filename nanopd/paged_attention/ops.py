"""The operations the models call. Here is chosen what carries them out."""

from __future__ import annotations

import torch
from torch import Tensor

from nanopd.paged_attention import cuda, reference
from nanopd.paged_attention.batch import AttentionBatch

__all__ = ["AttentionBatch", "paged_attention", "plan_attention", "store_kv"]


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write new tokens' keys and values, [T, kv_heads, head_dim] each, to their slots in the cache.

    The caches are [num_blocks, block_size, kv_heads, head_dim]; `slot_mapping` is int64 [T]. On a GPU the store is
    part of a larger kernel, `rope_and_store`; this one is for what that has no version of.
    """
    reference.store_kv(key, value, key_cache, value_cache, slot_mapping)


def plan_attention(batch: AttentionBatch, key_cache: Tensor, heads: int) -> None:
    """Once a step, before its first layer: split the decodes' work over the GPU, the same for all layers."""
    if batch.num_decodes and batch.contexts is not None and cuda.supports_attention(key_cache):
        batch.plan = cuda.plan_decode(batch.contexts[: batch.num_decodes], key_cache, heads)


def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch,
                    scale: float) -> Tensor:
    """Causal attention of [T, heads, head_dim] queries over their rows' cached tokens; same shape back.

    The new tokens' own keys and values must be stored already. New token j of a row sees all tokens cached
    before the row's new ones, and the new ones up to itself. Query heads share KV heads in equal groups.

    On a GPU the rows at the front that decode go to one kernel and those after them to another.
    """
    if batch.contexts is None or not cuda.supports_attention(key_cache):
        return reference.paged_attention(query, key_cache, value_cache, batch, scale)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if batch.num_decodes:
        _decode(output, query, key_cache, value_cache, batch, scale)
    if batch.num_decodes < len(batch.query_lens):
        _prefill(output, query, key_cache, value_cache, batch, scale)
    return output


def _decode(output: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch,
            scale: float) -> None:
    rows = slice(0, batch.num_decodes)
    cuda.decode_attention(output[rows], query[rows], key_cache, value_cache, batch.block_tables[rows],
                          batch.contexts[rows], batch.plan, scale)  # type: ignore[index, arg-type]


def _prefill(output: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch,
             scale: float) -> None:
    rows = slice(batch.num_decodes, len(batch.query_lens))
    cuda.prefill_attention(output, query, key_cache, value_cache, batch.block_tables[rows],
                           batch.starts[batch.num_decodes :], batch.contexts[rows],  # type: ignore[index]
                           max(batch.query_lens[rows]), scale)
