"""Between the host and a GPU without waiting: torch's own `torch.tensor(list, device="cuda")` stops until the GPU has
caught up, because the list's memory can't be read later. Pinned memory can."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A list as a tensor on the device: there as soon as the stream has come so far."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def pinned_bytes(size: int) -> Tensor:
    """Zeros, uint8 [size], from where a GPU copies on its own."""
    return torch.zeros(size, dtype=torch.uint8, pin_memory=True)


def download(tensor: Tensor) -> Tensor:
    """A copy in pinned memory: readable once the stream has come so far."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
