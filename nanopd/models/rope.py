"""Rotary position embeddings: position p turns the i-th pair of a head's dimensions by p * inv_freq[i]."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nanopd.config import ModelSpec


class RotaryEmbedding(nn.Module):
    """Positions [T] -> cosines and sines, [T, head_dim] each, for `apply_rotary`."""

    inv_freq: Tensor

    def __init__(self, spec: ModelSpec, device: torch.device | str | None = None) -> None:
        super().__init__()
        inv_freq, self.attention_factor = inverse_frequencies(spec)
        # empty(0) tells torch's default device where none is given
        self.register_buffer("inv_freq", inv_freq.to(torch.empty(0, device=device).device), persistent=False)
        self.max_position = spec.max_position
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions, [max_position, head_dim] each: on a GPU it is quicker to look them up."""
        if dtype not in self._tables:
            self._tables[dtype] = self(torch.arange(self.max_position, device=self.inv_freq.device), dtype)
        return self._tables[dtype]

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return cos.to(dtype), sin.to(dtype)


def apply_rotary(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [T, heads, head_dim]. Dimension i pairs with i + head_dim / 2."""
    cos, sin = (part[:, None] for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def inverse_frequencies(spec: ModelSpec) -> tuple[Tensor, float]:
    """Radians per position, float32 [head_dim / 2] on the CPU, and the factor on cosines and sines."""
    scaling = spec.rope_scaling
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device="cpu") / spec.head_dim
    inv_freq = 1.0 / (spec.rope_theta**exponents)
    if scaling.kind == "linear":
        return inv_freq / scaling.params["factor"], 1.0
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling.params), 1.0
    if scaling.kind == "yarn":
        return _yarn(inv_freq, spec), _yarn_attention_factor(scaling.params)
    return inv_freq, 1.0


def _llama3(inv_freq: Tensor, params: dict) -> Tensor:
    """Slow rotations, of which the original context saw only a part, are stretched; fast ones stay as they are."""
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    turns = params["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # in the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / params["factor"] + kept * inv_freq


def _yarn(inv_freq: Tensor, spec: ModelSpec) -> Tensor:
    """As llama3's, but the blend is linear in the dimension's index, between two numbers of turns."""
    params = spec.rope_scaling.params
    original = params["original_max_position_embeddings"]

    def dimension_with(turns: float) -> float:
        return spec.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low = dimension_with(params.get("beta_fast") or 32)
    high = dimension_with(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.head_dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(len(inv_freq), dtype=torch.float32, device="cpu")
    stretched = ((index - low) / (high - low)).clamp(0, 1)
    return inv_freq / params["factor"] * stretched + inv_freq * (1 - stretched)


def _yarn_attention_factor(params: dict) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(params["factor"]) + 1.0 if params["factor"] > 1 else 1.0

    if params.get("attention_factor") is not None:
        return params["attention_factor"]
    if params.get("mscale") and params.get("mscale_all_dim"):
        return mscale(params["mscale"]) / mscale(params["mscale_all_dim"])
    return mscale(1.0)
