"""The other kernels of a step: the linear layers of few tokens, and what is bound by memory between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopd.benchmark import attention
from nanopd.benchmark.show import progress
from nanopd.benchmark.timing import Call, graph_us, num_sets
from nanopd.config import ModelSpec
from nanopd.models import fused
from nanopd.models.layers import DecoderLayer
from nanopd.models.spec import load_spec
from nanopd.paged_attention import cuda

LINEAR_TOKENS = (1, 4, 16, 32, 64, 128, 256)
SMALL_TOKENS = (1, 64, 2048)
OPS = ("decode_attention", "small", "linear", "prefill_attention")  # what heats the GPU comes last
MODEL = "qwen3-8b"  # whose shapes are measured
BLOCK_SIZE = 16
OURS, LIBRARY = "nanopd", "library, products alone"


def run(read_gb_s: float, only: Iterable[str] = OPS, with_peers: bool = True) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and summary. A part that breaks is left out, and the summary says why: the others took minutes of a GPU."""
    attention.require_kernels()
    parts: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "decode_attention": lambda: attention.decode_rows(read_gb_s, with_peers=with_peers),
        "small": lambda: small_rows(read_gb_s),
        "linear": lambda: linear_rows(read_gb_s),
        "prefill_attention": attention.prefill_rows,
    }
    summaries = {"decode_attention": attention.decode_summary, "prefill_attention": attention.prefill_summary}
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for name in (part for part in OPS if part in only):
        try:
            found = list(parts[name]())
            rows += found
            if name in summaries:
                summary |= summaries[name](found)
        except Exception as error:
            summary[f"failed_{name}"] = f"{type(error).__name__}: {error}"
    return rows, summary


# ---------------------------------------------------------------------------------------------------- linear


class LinearChain:
    """The matrices of several layers, one after the other as a step runs them, attention left out."""

    def __init__(self, spec: ModelSpec, num_layers: int = 4) -> None:
        self.layers = [DecoderLayer(spec, device="cuda", dtype=torch.bfloat16) for _ in range(num_layers)]
        for name, parameter in (named for layer in self.layers for named in layer.named_parameters()):
            parameter.fill_(1) if "norm" in name else parameter.normal_(std=parameter.shape[-1] ** -0.5)
        self.layer_bytes = sum(weight.nbytes for weight in self._weights(self.layers[0]))
        self.sizes = {weight.shape[1] for weight in self._weights(self.layers[0])}

    @staticmethod
    def _weights(layer: DecoderLayer) -> list[Tensor]:
        parts = layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj
        return [part.weight for part in parts]

    def ours(self, tokens: int) -> list[Call]:
        """As the engine runs them: norms, activation and residual additions included."""
        residual = _random(tokens, self.layers[0].self_attn.qkv_proj.weight.shape[1])
        attended = _random(tokens, self.layers[0].self_attn.o_proj.weight.shape[1])

        def run(layer: DecoderLayer) -> None:
            fused.norm_linear(residual, layer.input_layernorm, layer.self_attn.qkv_proj)
            fused.linear_add(attended, layer.self_attn.o_proj, residual)
            gated = fused.norm_gate_up(residual, layer.post_attention_layernorm, layer.mlp.gate_up_proj)
            fused.linear_add(gated, layer.mlp.down_proj, residual)

        return [partial(run, layer) for layer in self.layers]

    def library(self, tokens: int) -> list[Call]:
        """The four products alone."""
        inputs = {size: _random(tokens, size) for size in self.sizes}

        def run(layer: DecoderLayer) -> None:
            for weight in self._weights(layer):
                F.linear(inputs[weight.shape[1]], weight)

        return [partial(run, layer) for layer in self.layers]


def linear_rows(read_gb_s: float, tokens: Iterable[int] = LINEAR_TOKENS) -> Iterator[dict[str, Any]]:
    """Microseconds of one layer's linear parts; bandwidth counts the weights."""
    chain = LinearChain(load_spec(MODEL))
    for num_tokens in tokens:
        progress(f"linear layers: {num_tokens} tokens")
        for kernel, calls in {OURS: chain.ours, LIBRARY: chain.library}.items():
            us = graph_us(calls(num_tokens))
            gb_s = chain.layer_bytes / us / 1e3
            yield {"op": "linear_chain", "tokens": num_tokens, "kernel": kernel, "us": us, "gb_s": gb_s,
                   "share": gb_s / read_gb_s}


# ----------------------------------------------------------------------------------------------- small kernels


def small_rows(read_gb_s: float, tokens: Iterable[int] = SMALL_TOKENS) -> Iterator[dict[str, Any]]:
    """What lies between the large products, at decode and prefill sizes. Bytes are those that must be moved."""
    spec = load_spec(MODEL)
    for num_tokens in tokens:
        for op, make in SMALL.items():
            progress(f"{op}: {num_tokens}")
            call, size = make(spec, num_tokens)
            us = graph_us([call, *(make(spec, num_tokens)[0] for _ in range(num_sets(size, most=64) - 1))])
            yield {"op": op, "tokens": num_tokens, "us": us, "gb_s": size / us / 1e3, "share": size / us / 1e3 / read_gb_s}


def _rms_norm(spec: ModelSpec, tokens: int) -> tuple[Call, int]:
    x, weight = _random(tokens, spec.hidden_size), _random(spec.hidden_size)
    return partial(cuda.rms_norm, x, weight, spec.rms_norm_eps), 2 * x.nbytes


def _silu_and_mul(spec: ModelSpec, tokens: int) -> tuple[Call, int]:
    gate_up = _random(tokens, 2 * spec.intermediate_size)
    return partial(cuda.silu_and_mul, gate_up), gate_up.nbytes * 3 // 2


def _rope_and_store(spec: ModelSpec, tokens: int) -> tuple[Call, int]:
    qkv = _random(tokens, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim)
    rotation = _random(tokens, spec.head_dim), _random(tokens, spec.head_dim)
    norms = _random(spec.head_dim), _random(spec.head_dim)
    blocks = -(-tokens // BLOCK_SIZE) + 1
    cache = [_random(blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim) for _ in range(2)]
    slots = torch.randperm(blocks * BLOCK_SIZE, device="cuda")[:tokens]
    return partial(cuda.rope_and_store, qkv, rotation, *norms, spec.rms_norm_eps, *cache, slots, spec.num_heads), \
        2 * qkv.nbytes


def _greedy_sample(spec: ModelSpec, tokens: int) -> tuple[Call, int]:
    logits = _random(tokens, spec.vocab_size)
    return partial(cuda.greedy_sample, logits), logits.nbytes


def _move_blocks(spec: ModelSpec, tokens: int) -> tuple[Call, int]:
    """Copy-on-write of all blocks that hold the tokens, in all layers."""
    count = -(-tokens // BLOCK_SIZE)
    cache = _random(spec.num_layers, 2, 2 * count, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
    targets, sources = torch.randperm(2 * count, device="cuda").chunk(2)
    return partial(cuda.move_blocks, cache, targets, cache, sources), cache.nbytes


SMALL: dict[str, Callable[[ModelSpec, int], tuple[Call, int]]] = {
    "rms_norm": _rms_norm, "silu_and_mul": _silu_and_mul, "rope_and_store": _rope_and_store,
    "greedy_sample": _greedy_sample, "move_blocks": _move_blocks,
}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
