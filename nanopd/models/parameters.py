"""The modules that hold parameters. They start uninitialised: the loader fills every one of them.

What is computed with them is in fused.py, for a kernel often takes several at once. `factory` is torch's usual pair of
`device` and `dtype`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _parameter(*shape: int, **factory: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, **factory), requires_grad=False)


class Linear(nn.Module):
    """[..., in_features] -> [..., out_features]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **factory: Any) -> None:
        super().__init__()
        self.weight = _parameter(out_features, in_features, **factory)
        self.bias = _parameter(out_features, **factory) if bias else None


class FusedLinear(Linear):
    """Several projections of one input as one matrix product.

    `parts` names the projections as the checkpoint does, each with its output size, in stacking order.
    """

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool = False, **factory: Any) -> None:
        super().__init__(in_features, sum(parts.values()), bias, **factory)
        self.parts = parts

    def split(self, stacked: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Views of the parts of an output, a weight or a bias."""
        return stacked.split(list(self.parts.values()), dim)


class Embedding(nn.Module):
    """Token ids [T] -> [T, hidden]. Where a model ties its embeddings, their weight also makes the logits."""

    bias = None

    def __init__(self, vocab_size: int, hidden_size: int, **factory: Any) -> None:
        super().__init__()
        self.weight = _parameter(vocab_size, hidden_size, **factory)


class RMSNorm(nn.Module):
    """Scale the last dimension to a root mean square of 1, in float32, then by a learned weight."""

    def __init__(self, size: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.weight = _parameter(size, **factory)
        self.eps = eps
