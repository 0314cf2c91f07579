"""Paged attention in plain torch: what the CUDA kernels are checked against, and what runs on a CPU."""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopd.paged_attention.batch import AttentionBatch


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    # view, not flatten: on a cache that isn't contiguous flatten would write to a copy, and say nothing
    key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, slot_mapping, key)
    value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, slot_mapping, value)


def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch,
                    scale: float) -> Tensor:
    starts = [0, *accumulate(batch.query_lens)]
    output = torch.empty_like(query)
    for query_len, rows in _rows_by_query_len(batch.query_lens).items():
        first = torch.tensor([starts[row] for row in rows], device=query.device)
        tokens = first[:, None] + torch.arange(query_len, device=query.device)  # [N, Q]
        context_lens = torch.tensor([batch.context_lens[row] for row in rows], device=query.device)
        num_blocks = -(-max(batch.context_lens[row] for row in rows) // key_cache.shape[1])
        tables = batch.block_tables[rows, :num_blocks]
        keys, values = key_cache[tables].flatten(1, 2), value_cache[tables].flatten(1, 2)  # [N, S, ...]
        output[tokens] = _attend(query[tokens], keys, values, context_lens, scale)
    return output


def _rows_by_query_len(query_lens: list[int]) -> dict[int, list[int]]:
    """Rows that can share one padded call. Decodes, the many, all have one new token; prefill lengths vary."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row, query_len in enumerate(query_lens):
        groups[query_len].append(row)
    return groups


def _attend(query: Tensor, keys: Tensor, values: Tensor, context_lens: Tensor, scale: float) -> Tensor:
    """Attention of N rows with Q new tokens each, their cached tokens padded to S.

    query [N, Q, heads, head_dim]; keys and values [N, S, kv_heads, head_dim]; context_lens [N].
    """
    positions = torch.arange(keys.shape[1], device=keys.device)
    # The last new token sees the whole context, each one before it one token less.
    visible = context_lens[:, None] - torch.arange(query.shape[1] - 1, -1, -1, device=keys.device)  # [N, Q]
    mask = positions < visible[..., None]  # [N, Q, S]
    # Slots past the context hold whatever was there before, NaN perhaps. A weight of 0 does not stop it
    # (0 * NaN is NaN), so the padding is emptied, in place: keys and values are gathered copies.
    padding = (positions >= context_lens[:, None])[..., None, None]
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.masked_fill_(padding, 0).transpose(1, 2),
        values.masked_fill_(padding, 0).transpose(1, 2),
        attn_mask=mask[:, None],
        scale=scale,
        enable_gqa=query.shape[2] != keys.shape[2],
    )
    return output.transpose(1, 2)
