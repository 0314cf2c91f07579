"""The parts of a decoder layer, put together from parameters and fused operations.

`factory` is torch's usual pair of `device` and `dtype`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nanopd.config import ModelSpec
from nanopd.models.fused import linear_add, norm_gate_up, norm_linear, rope_and_store
from nanopd.models.parameters import FusedLinear, Linear, RMSNorm
from nanopd.paged_attention.ops import AttentionBatch, paged_attention


class MLP(nn.Module):
    """x + down(silu(gate(h)) * up(h)), where h is the normalised x."""

    def __init__(self, spec: ModelSpec, **factory: Any) -> None:
        super().__init__()
        parts = {"gate_proj": spec.intermediate_size, "up_proj": spec.intermediate_size}
        self.gate_up_proj = FusedLinear(spec.hidden_size, parts, spec.mlp_bias, **factory)
        self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, spec.mlp_bias, **factory)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return linear_add(norm_gate_up(x, norm, self.gate_up_proj), self.down_proj, x)


class Attention(nn.Module):
    """x + self-attention of the normalised x, through the paged cache: stores the new tokens' K and V, then attends."""

    def __init__(self, spec: ModelSpec, **factory: Any) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.scale = spec.head_dim**-0.5
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = FusedLinear(spec.hidden_size, parts, spec.qkv_bias, **factory)
        self.o_proj = Linear(query_size, spec.hidden_size, spec.output_bias, **factory)
        self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps, **factory) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps, **factory) if spec.qk_norm else None

    def forward(self, x: Tensor, norm: RMSNorm, rotation: tuple[Tensor, Tensor], kv: tuple[Tensor, Tensor],
                batch: AttentionBatch) -> Tensor:
        qkv = norm_linear(x, norm, self.qkv_proj)
        norms = (self.q_norm, self.k_norm) if self.q_norm is not None and self.k_norm is not None else None
        query = rope_and_store(qkv, rotation, norms, self.num_heads, kv, batch.slot_mapping)
        return linear_add(paged_attention(query, *kv, batch, self.scale).flatten(1), self.o_proj, x)


class DecoderLayer(nn.Module):
    """Attention, then MLP, each on the normalised input and added to it. [T, hidden] -> [T, hidden]."""

    def __init__(self, spec: ModelSpec, **factory: Any) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, **factory)
        self.self_attn = Attention(spec, **factory)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, **factory)
        self.mlp = MLP(spec, **factory)

    def attend(self, x: Tensor, rotation: tuple[Tensor, Tensor], kv: tuple[Tensor, Tensor],
               batch: AttentionBatch) -> Tensor:
        return self.self_attn(x, self.input_layernorm, rotation, kv, batch)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(x, self.post_attention_layernorm)
