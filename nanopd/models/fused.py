"""A layer's operations with their neighbours: one kernel each on a GPU, plain torch elsewhere.

The plain versions follow Hugging Face's order, casts included, so that tokens agree with its models'. The kernels
round less often. Which one runs depends on the tensors alone, so a decoder has one flow for all devices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopd.models.parameters import Embedding, Linear, RMSNorm
from nanopd.models.rope import RotaryEmbedding, apply_rotary
from nanopd.paged_attention import cuda
from nanopd.paged_attention.ops import store_kv


def embed(token_ids: Tensor, positions: Tensor, last_drawn: Tensor | None, embedding: Embedding,
          rotary: RotaryEmbedding) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The residual stream's start, [T, hidden], and the cosines and sines of the positions, [T, head_dim] each.

    A token id below zero, -1 - i, stands for last_drawn[i].
    """
    weight = embedding.weight
    if cuda.usable(weight):
        return cuda.embed(token_ids, positions, token_ids if last_drawn is None else last_drawn, weight,
                          rotary.tables(weight.dtype))
    if last_drawn is not None:
        token_ids = torch.where(token_ids < 0, last_drawn[(-1 - token_ids).clamp_(min=0)], token_ids)
    return F.embedding(token_ids, weight), rotary(positions, weight.dtype)


def rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """Scale the last dimension to a root mean square of 1, in float32, then by the norm's weight."""
    if cuda.usable(x):
        return cuda.rms_norm(x, norm.weight, norm.eps)
    x32 = x.float()
    normed = x32 * (x32.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt()
    return norm.weight * normed.to(x.dtype)


def norm_linear(x: Tensor, norm: RMSNorm, linear: Linear | Embedding) -> Tensor:
    """The projection of the normalised x. [T, in_features] -> [T, out_features]."""
    if cuda.usable(x) and cuda.linear_supports(x, linear.weight):
        return cuda.linear(x, linear.weight, linear.bias, norm_weight=norm.weight, eps=norm.eps)
    return F.linear(rms_norm(x, norm), linear.weight, linear.bias)


def norm_gate_up(x: Tensor, norm: RMSNorm, linear: Linear) -> Tensor:
    """silu(gate) * up of the normalised x, where `linear` stacks gate and up. [T, in] -> [T, out_features / 2]."""
    if cuda.usable(x) and linear.bias is None and cuda.linear_supports(x, linear.weight, silu=True):
        return cuda.linear(x, linear.weight, norm_weight=norm.weight, eps=norm.eps, silu=True)
    gate_up = norm_linear(x, norm, linear)
    if cuda.usable(x):
        return cuda.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_add(x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
    """residual + the projection of x. On a GPU the sum is written over `residual`, which has no other reader."""
    if not cuda.usable(x) or linear.bias is not None:
        return residual + F.linear(x, linear.weight, linear.bias)
    if cuda.linear_supports(x, linear.weight):
        return cuda.linear(x, linear.weight, residual=residual)
    return residual.addmm_(x, linear.weight.t())  # the library adds in its epilogue


def rope_and_store(qkv: Tensor, rotation: tuple[Tensor, Tensor], norms: tuple[RMSNorm, RMSNorm] | None, heads: int,
                   kv: tuple[Tensor, Tensor], slot_mapping: Tensor) -> Tensor:
    """From fused projections to what attention takes.

    Queries and keys are normalised per head where the model has norms for them, and turned by their positions. Keys
    and values go to the cache, `kv`, at `slot_mapping`. qkv [T, (heads + 2 kv_heads) * head_dim]; on a GPU it is
    overwritten. Returns the queries, [T, heads, head_dim].
    """
    kv_heads, head_dim = kv[0].shape[2:]
    if cuda.usable(qkv):
        weights = (None, None, 0.0) if norms is None else (norms[0].weight, norms[1].weight, norms[0].eps)
        return cuda.rope_and_store(qkv, rotation, *weights, *kv, slot_mapping, heads)
    query, key, value = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        query, key = rms_norm(query, norms[0]), rms_norm(key, norms[1])
    query, key = apply_rotary(query, rotation), apply_rotary(key, rotation)
    store_kv(key, value, *kv, slot_mapping)
    return query
