"""The least time a step can take: what it must read over the bandwidth, what it must compute over the matmul rate.

Activations, norms and the embedding's rows are left out: they are thousandths of the weights and the KV cache.
"""

from __future__ import annotations

from nanopd.config import ModelSpec


def linear_weights(spec: ModelSpec) -> int:
    """Elements of the layers' matrices."""
    heads_out = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    attention = spec.hidden_size * heads_out + spec.num_heads * spec.head_dim * spec.hidden_size
    return spec.num_layers * (attention + 3 * spec.hidden_size * spec.intermediate_size)


def head_weights(spec: ModelSpec) -> int:
    """Elements of the output head, be it the embedding table or not."""
    return spec.hidden_size * spec.vocab_size


def attention_flops(heads: int, head_dim: int, num_new: int, num_before: int = 0) -> int:
    """Causal attention of `num_new` tokens that see `num_before` older ones and each other: two products."""
    seen = num_new * num_before + num_new * (num_new + 1) // 2
    return 4 * heads * head_dim * seen


def decode_floor_ms(spec: ModelSpec, batch: int, context: int, read_gb_s: float, matmul_tflop_s: float,
                    element_bytes: int = 2) -> dict[str, float]:
    """The parts of a decode step of `batch` sequences that each attend to `context` tokens, and their sum.

    The linear layers take the longer of reading their weights and multiplying with them. Attention is counted
    after them, not beside them.
    """
    weights = linear_weights(spec) + head_weights(spec)
    weight_ms = weights * element_bytes / read_gb_s / 1e6
    matmul_ms = 2 * weights * batch / matmul_tflop_s / 1e9
    kv_ms = batch * context * spec.kv_bytes_per_token(element_bytes) / read_gb_s / 1e6
    return {"weight_ms": weight_ms, "matmul_ms": matmul_ms, "kv_ms": kv_ms, "floor_ms": max(weight_ms, matmul_ms) + kv_ms}


def prefill_flops(spec: ModelSpec, num_tokens: int) -> int:
    """One prompt: the layers for every token, causal attention, and the head for the last token."""
    attention = spec.num_layers * attention_flops(spec.num_heads, spec.head_dim, num_tokens)
    return 2 * linear_weights(spec) * num_tokens + attention + 2 * head_weights(spec)
