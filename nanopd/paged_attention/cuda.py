"""The CUDA kernels as Python functions: they allocate what is returned and keep what is reused.

Shapes: x [T, features]; query and out [R or T, heads, head_dim]; caches [num_blocks, block_size, kv_heads, head_dim];
block_tables int32 [R, width]; contexts int32 [R], 0 for a row of padding. All of it may be captured in CUDA graphs, if
each shape has run once before. With NANOPD_DEBUG=1 block ids, slots and lengths are checked first, which waits for
the GPU, so not during a capture.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nanopd.paged_attention.build import load_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEBUG = os.environ.get("NANOPD_DEBUG") == "1"

_ops = torch.ops.nanopd


def usable(x: Tensor) -> bool:
    """Whether there are kernels for tensors like this one. Compiles them when first asked."""
    return x.is_cuda and x.dtype in DTYPES and load_kernels()


def supports_attention(key_cache: Tensor) -> bool:
    """Whether the attention kernels read such a cache."""
    _, block_size, _, head_dim = key_cache.shape
    return usable(key_cache) and head_dim % 8 == 0 and head_dim <= 256 and block_size % 8 == 0


# ------------------------------------------------------------------------------------------- layers, sampling, blocks


def embed(token_ids: Tensor, positions: Tensor, last_drawn: Tensor, weight: Tensor,
          tables: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The tokens' rows of `weight`, and their positions' rows of two tables. Token -1 - i stands for last_drawn[i]."""
    if DEBUG:
        _require_range("token_ids", token_ids, -len(last_drawn), len(weight))
        _require_range("positions", positions, 0, len(tables[0]))
    tokens = len(token_ids)
    out = weight.new_empty(tokens, weight.shape[1])
    cos, sin = (table.new_empty(tokens, table.shape[1]) for table in tables)
    _ops.embed(out, cos, sin, token_ids, positions, last_drawn, weight, *tables)
    return out, (cos, sin)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _ops.rms_norm(out, x, weight, eps)
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu of the left half of the columns times the right half."""
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _ops.silu_and_mul(out, gate_up)
    return out


def rope_and_store(qkv: Tensor, rotation: tuple[Tensor, Tensor], q_weight: Tensor | None, k_weight: Tensor | None,
                   eps: float, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, heads: int) -> Tensor:
    """Norm and turn the queries in `qkv`, do the same with the keys and store them with the values.

    Returns the queries, a view of `qkv`. Slot -1 stores nothing.
    """
    if DEBUG:
        _require_range("slot_mapping", slot_mapping, -1, key_cache.shape[0] * key_cache.shape[1])
    _ops.rope_and_store(qkv, *rotation, q_weight, k_weight, eps, key_cache, value_cache, slot_mapping, heads)
    head_dim = key_cache.shape[-1]
    return qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))


def greedy_sample(logits: Tensor, out: tuple[Tensor, Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of logits: its likeliest token, int64; that one's log-probability, float32; and whether the row is
    broken, that is holds a NaN or +inf or nothing but -inf, bool."""
    if out is None:
        dtypes = (torch.int64, torch.float32, torch.bool)
        out = tuple(logits.new_empty(len(logits), dtype=dtype) for dtype in dtypes)  # type: ignore[assignment]
    _ops.greedy_sample(*out, logits)
    return out


def move_blocks(target: Tensor, target_ids: Tensor | None, source: Tensor, source_ids: Tensor | None,
                max_thread_blocks: int = 0) -> None:
    """Copy blocks of [..., blocks, block_size, kv_heads, head_dim], in all planes that stand before `blocks`.

    Without ids they are blocks 0, 1, 2... The two may be the same tensor if no block is both read and written, and
    may lie on two GPUs; the copy runs where the ids are, and on no more thread blocks than told (0: as many as fill
    the GPU), so that others can run beside it.
    """
    if DEBUG:
        for name, ids, blocks in (("target_ids", target_ids, target), ("source_ids", source_ids, source)):
            if ids is not None:
                _require_range(name, ids, 0, blocks.shape[-4])
    _ops.move_blocks(target, target_ids, source, source_ids, max_thread_blocks)


# --------------------------------------------------------------------------------------------------------- attention


def naive_attention(out: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor,
                    query_starts: Tensor, contexts: Tensor, scale: float) -> None:
    """The first version: one thread block for each new token and head. Rows as in `prefill_attention`."""
    if DEBUG:
        _check_rows(key_cache, block_tables, contexts, query_starts, query.shape[0])
    _ops.naive_attention(out, query, key_cache, value_cache, block_tables, query_starts, contexts, scale)


def plan_decode(contexts: Tensor, key_cache: Tensor, heads: int) -> Tensor:
    """How `decode_attention` shall split these rows over the GPU; good for all layers of a step."""
    plan = contexts.new_empty(_ops.decode_plan_bytes(contexts.shape[0]), dtype=torch.uint8)
    _, block_size, kv_heads, head_dim = key_cache.shape
    _ops.plan_decode(plan, contexts, block_size, heads, kv_heads, head_dim, key_cache)
    return plan


def decode_attention(out: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor,
                     contexts: Tensor, plan: Tensor, scale: float) -> None:
    """Attention of rows with one new token each."""
    if DEBUG:
        _check_rows(key_cache, block_tables, contexts)
    rows, heads, head_dim = query.shape
    scratch = _scratch(query.device, _ops.decode_scratch_bytes(rows, heads, head_dim))
    _ops.decode_attention(out, query, key_cache, value_cache, block_tables, contexts, plan, scratch, scale)


def prefill_attention(out: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor,
                      query_starts: Tensor, contexts: Tensor, max_query_len: int, scale: float) -> None:
    """Causal attention of rows with any number of new tokens: row r's are query_starts[r] to query_starts[r + 1]."""
    if DEBUG:
        _check_rows(key_cache, block_tables, contexts, query_starts, query.shape[0], max_query_len)
    _ops.prefill_attention(out, query, key_cache, value_cache, block_tables, query_starts, contexts, max_query_len, scale)


# ------------------------------------------------------------------------------------------------------------ linear


def linear_supports(x: Tensor, weight: Tensor, silu: bool = False) -> bool:
    """Whether `linear` has a kernel for this that beats the library's."""
    return usable(x) and _ops.linear_supports(x, weight.shape[0], silu)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm_weight: Tensor | None = None, eps: float = 0.0,
           residual: Tensor | None = None, silu: bool = False) -> Tensor:
    """[norm](x) @ weight.T + bias, then silu-and-multiply of its two halves, then `residual` is added to.

    With a residual the result takes its place, and that is what is returned.
    """
    features = weight.shape[0]
    out = x.new_empty(x.shape[0], features // 2 if silu else features) if residual is None else residual
    _ops.linear(out, x, weight, bias, norm_weight, residual, eps, silu)
    return out


# ----------------------------------------------------------------------------------------------------------- scratch

_scratches: dict[torch.device, list[Tensor]] = {}


def _scratch(device: torch.device, size: int) -> Tensor:
    """Bytes for partial results. The last buffer is the current one; the outgrown are kept, for graphs use them."""
    buffers = _scratches.setdefault(device, [])
    if not buffers or buffers[-1].numel() < size:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("scratch memory can't grow during a capture: run the same shapes once before")
        buffers.append(torch.empty(size, dtype=torch.uint8, device=device))
    return buffers[-1]


# ------------------------------------------------------------------------------------------------------ debug checks


def _check_rows(key_cache: Tensor, block_tables: Tensor, contexts: Tensor, query_starts: Tensor | None = None,
                num_tokens: int = 0, max_query_len: int | None = None) -> None:
    num_blocks, block_size = key_cache.shape[:2]
    width = block_tables.shape[1]
    _require_range("contexts", contexts, 0, width * block_size + 1)
    used = torch.arange(width, device=contexts.device) * block_size < contexts[:, None]
    _require_range("block_tables", block_tables[used], 0, num_blocks)
    if query_starts is None:
        return
    _require_range("query_starts", query_starts, 0, num_tokens + 1)
    lengths = query_starts.diff()
    longest = num_tokens if max_query_len is None else max_query_len
    _require_range("lengths between query_starts", lengths, 0, longest + 1)
    if (lengths > contexts).any():
        raise ValueError("contexts must count a row's new tokens too, but some are below the row's query length")


def _require_range(name: str, values: Tensor, first: int, end: int) -> None:
    if values.numel() and not (first <= (low := values.min().item()) and (high := values.max().item()) < end):
        wrong = low if low < first else high
        raise ValueError(f"{name} must lie in {first} to {end - 1}, but {wrong} is among them")
