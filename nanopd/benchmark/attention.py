"""Attention kernels alone: decode over a grid of batches and contexts, prefill with and without a prefix."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from nanopd.benchmark import peers
from nanopd.benchmark.ceilings import beside_matmul
from nanopd.benchmark.environment import CannotMeasure
from nanopd.benchmark.floors import attention_flops
from nanopd.benchmark.show import progress
from nanopd.benchmark.timing import Call, eager_us, graph_us, num_sets
from nanopd.paged_attention import cuda, ops, reference
from nanopd.paged_attention.batch import AttentionBatch
from nanopd.paged_attention.build import load_kernels

BATCHES = (1, 4, 16, 32, 64, 128, 256)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)
PREFILLS = ((2048, 0), (8192, 0), (2048, 6144))  # new tokens, tokens cached before them
OURS, NAIVE, REFERENCE = "split_kv", "naive", "reference"
ENGINE = "engine"  # whichever path the engine takes
FLASHINFER = {"flashinfer": False, "flashinfer tensor cores": True}
AGREEMENT = 0.02  # bf16 rounds each weight and each output to 0.004
FREE_SHARE = 0.45  # of the GPU's free memory, for the keys and values of the largest cell


@dataclass(frozen=True)
class Shape:
    """One layer's attention. The default is Qwen3-8B's, and Llama-3.1-8B's."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def kv_bytes(self, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return 2 * num_tokens * self.kv_heads * self.head_dim * dtype.itemsize


class Pool:
    """Random keys and values of one layer, for several cells to use."""

    def __init__(self, shape: Shape, num_tokens: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:
        size = (-(-num_tokens // shape.block_size), shape.block_size, shape.kv_heads, shape.head_dim)
        self.shape = shape
        self.key = torch.randn(size, device=device, dtype=dtype)
        self.value = torch.randn(size, device=device, dtype=dtype)

    @classmethod
    def for_tokens(cls, shape: Shape, most_tokens: int) -> Pool:
        """Room for cells of up to `most_tokens`, and for the small ones to move through."""
        least = num_sets(shape.kv_bytes(shape.block_size), most=2**30) * shape.block_size
        return cls(shape, max(most_tokens, 2 * least))


class DecodeCell:
    """`batch` sequences of `context` tokens, one new token each, in blocks that lie anywhere."""

    def __init__(self, pool: Pool, batch: int, context: int) -> None:
        shape, like = pool.shape, pool.key
        self.shape, self.batch, self.context = shape, batch, context
        blocks = -(-context // shape.block_size)
        total = batch * blocks
        sets = min(len(like) // total, num_sets(shape.kv_bytes(total * shape.block_size, like.dtype)))
        self.caches = [(pool.key[i * total : (i + 1) * total], pool.value[i * total : (i + 1) * total]) for i in range(sets)]
        self.table = torch.randperm(total, device=like.device).view(batch, blocks).int()
        self.contexts = torch.full((batch,), context, device=like.device, dtype=torch.int32)
        self.query = torch.randn(batch, shape.heads, shape.head_dim, device=like.device, dtype=like.dtype)

    @property
    def bytes(self) -> int:
        return self.shape.kv_bytes(self.batch * self.context, self.query.dtype)

    def calls(self, kernel: str, out: Tensor) -> list[Call]:
        """One call for each set of keys and values. All write to `out`, but for the reference, which returns."""
        if kernel in FLASHINFER:
            return peers.flashinfer_decode(out, self.query, self.caches, self.table, self.context, FLASHINFER[kernel])
        if kernel == REFERENCE:
            batch = AttentionBatch(self.contexts, self.table, [1] * self.batch, [self.context] * self.batch)
            return [partial(reference.paged_attention, self.query, *cache, batch, self.shape.scale) for cache in self.caches]
        if kernel == NAIVE:
            starts = torch.arange(self.batch + 1, device=self.table.device, dtype=torch.int32)
            return [partial(cuda.naive_attention, out, self.query, *cache, self.table, starts, self.contexts, self.shape.scale)
                    for cache in self.caches]
        if kernel == OURS:
            plan = cuda.plan_decode(self.contexts, self.caches[0][0], self.shape.heads)
            return [partial(cuda.decode_attention, out, self.query, *cache, self.table, self.contexts, plan, self.shape.scale)
                    for cache in self.caches]
        raise ValueError(f"unknown kernel {kernel!r}; there are {', '.join((OURS, NAIVE, REFERENCE, *FLASHINFER))}")


def decode_us(kernel: str, batch: int, context: int, shape: Shape | None = None, pool: Pool | None = None) -> float:
    """Microseconds of one layer's decode attention, for cells of a notebook too."""
    require_kernels()
    pool = pool or Pool.for_tokens(shape or Shape(), batch * context)
    return _time(kernel, DecodeCell(pool, batch, context))[0]


def require_kernels() -> None:
    """Load the CUDA kernels; they are compiled the first time. Raises CannotMeasure where there are none."""
    if not load_kernels():
        raise CannotMeasure("the CUDA kernels could not be built here; `nanopd doctor` says what is missing")


def _time(kernel: str, cell: DecodeCell) -> tuple[float, Tensor]:
    """Microseconds, and the output over the last set of keys and values."""
    out = torch.full_like(cell.query, torch.nan)
    return graph_us(cell.calls(kernel, out), replays=3 if kernel == NAIVE else 7), out


def decode_rows(read_gb_s: float, batches: Iterable[int] = BATCHES, contexts: Iterable[int] = CONTEXTS,
                with_peers: bool = True) -> Iterator[dict[str, Any]]:
    """A row for each cell and kernel. Cells that don't fit into memory are left out."""
    shape = Shape()
    kernels = [OURS, NAIVE, *(FLASHINFER if with_peers and peers.has_flashinfer() else ())]
    room = FREE_SHARE * torch.cuda.mem_get_info()[0]
    cells = [(batch, context) for batch in batches for context in contexts if shape.kv_bytes(batch * context) <= room]
    pool = Pool.for_tokens(shape, max(batch * context for batch, context in cells))
    for batch, context in cells:
        progress(f"decode attention: {batch} x {context}")
        cell = DecodeCell(pool, batch, context)
        expected = None
        for kernel in kernels:
            us, out = _time(kernel, cell)
            expected = _agreeing(kernel, out, expected)
            gb_s = cell.bytes / us / 1e3
            yield {"op": "decode_attention", "batch": batch, "context": context, **asdict(shape), "kernel": kernel,
                   "us": us, "gb_s": gb_s, "share": gb_s / read_gb_s}


def _agreeing(kernel: str, out: Tensor, expected: Tensor | None) -> Tensor:
    """`out`, once it is known to be what the other kernels found: a wrong result's time is worth nothing."""
    if expected is not None:
        difference = ((out - expected).float().norm() / expected.float().norm()).item()
        if not difference < AGREEMENT:
            raise RuntimeError(f"{kernel} disagrees with {OURS} by {difference:.2g} of the result")
    return out


def decode_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Bandwidth where it counts, and our kernel against FlashInfer's faster path, cell by cell."""
    cells: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["batch"], row["context"]), {})[row["kernel"]] = row
    summary: dict[str, Any] = {}
    shares = [cell[OURS]["share"] for (batch, context), cell in cells.items() if batch >= 32 and context >= 4096]
    if shares:
        summary["share_from_32x4096_on"] = {"least": min(shares), "mean": statistics.mean(shares)}
    against = {key: min(cell[path]["us"] for path in FLASHINFER) / cell[OURS]["us"]
               for key, cell in cells.items() if all(path in cell for path in FLASHINFER)}
    if against:
        worst = min(against, key=lambda key: against[key])
        summary["times_flashinfer"] = {"geometric_mean": exp(statistics.mean(map(log, against.values()))),
                                       "worst": against[worst], "worst_cell": f"{worst[0]}x{worst[1]}"}
    return summary


# --------------------------------------------------------------------------------------------------- prefill


def prefill_rows(cases: Iterable[tuple[int, int]] = PREFILLS) -> Iterator[dict[str, Any]]:
    """One prompt's chunk of new tokens behind a cached prefix. Shares are of the matmul rate right beside."""
    shape = Shape()
    pool = Pool(shape, max(new + prefix for new, prefix in cases))
    for new, prefix in cases:
        progress(f"prefill attention: {new} after {prefix}")
        flops = attention_flops(shape.heads, shape.head_dim, new, prefix)
        calls = _prefill_calls(pool, new, prefix)
        times, rate = beside_matmul(lambda calls=calls: eager_us(list(calls.values())))
        for kernel, us in zip(calls, times):
            tflop_s = flops / us / 1e6
            yield {"op": "prefill_attention", "new": new, "prefix": prefix, **asdict(shape), "kernel": kernel,
                   "us": us, "tflop_s": tflop_s, "share": tflop_s / rate}


def _prefill_calls(pool: Pool, new: int, prefix: int) -> dict[str, Call]:
    shape, context = pool.shape, new + prefix
    blocks = -(-context // shape.block_size)
    table = torch.randperm(blocks, device="cuda").view(1, blocks).int()
    starts = torch.tensor([0, new], device="cuda", dtype=torch.int32)
    contexts = torch.tensor([context], device="cuda", dtype=torch.int32)
    query = torch.randn(new, shape.heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    cache = pool.key[:blocks], pool.value[:blocks]
    key, value = (part[table[0]].flatten(0, 1)[:context] for part in cache)
    nowhere = torch.full((new,), -1, device="cuda")  # attention alone stores nothing
    batch = AttentionBatch(nowhere, table, [new], [context], contexts=contexts, starts=starts)
    return {
        ENGINE: partial(ops.paged_attention, query, *cache, batch, shape.scale),
        "cudnn contiguous": peers.cudnn_prefill(query, key, value),
    }


def prefill_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        cases.setdefault(f"{row['new']} after {row['prefix']}", {})[row["kernel"]] = row["us"]
    return {"prefill_times_cudnn": {case: us["cudnn contiguous"] / us[ENGINE] for case, us in cases.items()}} if cases else {}


# ------------------------------------------------------------------------------------------- without a GPU


def reference_rows(cells: Iterable[tuple[int, int]] = ((1, 256), (4, 256), (4, 1024))) -> Iterator[dict[str, Any]]:
    """The reference path on the CPU, at sizes that take milliseconds."""
    shape = Shape(heads=8, kv_heads=2, head_dim=64)
    for batch, context in cells:
        progress(f"decode attention on the CPU: {batch} x {context}")
        pool = Pool(shape, batch * context, "cpu", torch.float32)
        cell = DecodeCell(pool, batch, context)
        us = _wall_us(cell.calls(REFERENCE, cell.query)[0])
        yield {"op": "decode_attention", "batch": batch, "context": context, **asdict(shape), "kernel": REFERENCE,
               "us": us, "gb_s": cell.bytes / us / 1e3}


def _wall_us(call: Call, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)
