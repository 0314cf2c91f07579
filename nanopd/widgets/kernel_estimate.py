"""A simple model of decode attention on a GPU: bytes, thread blocks, waves. No torch, no figures.

Three things that must never be taken for one another: the *floor* is arithmetic (bytes over bandwidth), the *estimate*
is this model's, and a *measurement* was made here or recorded elsewhere, and says which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

KERNELS = ("naive", "grouped", "split_kv")


@dataclass(frozen=True)
class Shape:
    """One layer's attention in a decode step: `batch` sequences, a new token each, `context` tokens in the cache."""

    batch: int = 64
    context: int = 1024
    kv_heads: int = 8
    group: int = 4  # query heads that share a KV head
    head_dim: int = 128
    block_size: int = 16
    item_bytes: int = 2

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def kv_bytes(self) -> int:
        """Every cached key and value, once: nobody can read less."""
        return self.batch * self.context * 2 * self.kv_heads * self.head_dim * self.item_bytes

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each number of each key, and of each value, for each query head."""
        return self.batch * self.context * 4 * self.heads * self.head_dim


@dataclass(frozen=True)
class Device:
    """What the estimate has to know of a GPU: bandwidth in bytes/s, arithmetic in FLOP/s."""

    name: str
    num_sms: int
    bandwidth: float
    peak_flops: float


@dataclass(frozen=True)
class Estimate:
    """What the simple model says of a kernel at a shape."""

    ctas: int  # thread blocks
    waves: int
    moved: int  # bytes that they ask for, all together
    floor: float  # seconds
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """Seconds of a kernel at a shape; `source` says where and when, for what was not measured here."""

    kernel: str
    shape: Shape
    seconds: float
    source: str = ""


def estimate(shape: Shape, device: Device, kernel: str = "split_kv", num_splits: int = 1) -> Estimate:
    """An SM runs one thread block at a time and draws its fair share of the bandwidth; so full waves cost the floor.

    naive: a thread block for each query head, so a KV head is asked for by each of its group. grouped: one for each KV
    head. split_kv: `num_splits` for each KV head, whole blocks each; their partial results are written and read again.
    """
    num_blocks = math.ceil(shape.context / shape.block_size)
    blocks_each = math.ceil(num_blocks / (num_splits if kernel == "split_kv" else 1))
    num_splits = math.ceil(num_blocks / blocks_each)
    ctas = shape.batch * (shape.heads if kernel == "naive" else shape.kv_heads * num_splits)
    tokens_each = min(blocks_each * shape.block_size, shape.context)
    bytes_each = 2 * tokens_each * shape.head_dim * shape.item_bytes
    partial = 4 * (shape.head_dim + 1) * shape.batch * shape.heads * num_splits if num_splits > 1 else 0
    waves = math.ceil(ctas / device.num_sms)
    seconds = waves * bytes_each * device.num_sms / device.bandwidth + 2 * partial / device.bandwidth
    moved = shape.kv_bytes * (shape.group if kernel == "naive" else 1) + 2 * partial
    return Estimate(ctas, waves, moved, shape.kv_bytes / device.bandwidth, seconds)
