"""What the device can do at best, measured with the simplest programs that should reach it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from nanopd.benchmark.timing import eager_us, graph_us

BUFFER_BYTES = 4 * 2**30
MATMUL_SIZE = 8192
Figure = TypeVar("Figure")


def measure() -> dict[str, float]:
    """All ceilings; about a second and a half. Matmul comes last: it warms the GPU up, and a hot GPU slows down."""
    return {"read_gb_s": read_gb_s(), "copy_gb_s": copy_gb_s(), "launch_us": launch_us(), "graph_node_us": graph_node_us(),
            "matmul_tflop_s": matmul_tflop_s()}


def read_gb_s() -> float:
    """Reading alone: the sum over 4 GiB."""
    buffer = torch.randn(BUFFER_BYTES // 4, device="cuda")
    return BUFFER_BYTES / graph_us([buffer.sum], replays=15, pick=min) / 1e3


def copy_gb_s() -> float:
    """Reading and writing 2 GiB each."""
    source = torch.randn(BUFFER_BYTES // 8, device="cuda")
    target = torch.empty_like(source)
    return BUFFER_BYTES / eager_us([lambda: target.copy_(source)], pick=min)[0] / 1e3  # in a graph the slower copy engine would do it


def matmul_tflop_s(seconds: float = 0.25) -> float:
    """bf16 8192^3 through the library, on random numbers (zeros run faster), over the second half of `seconds`.

    A GPU that has been busy for a second or so lowers its clock: compare a figure with the rate right beside it.
    """
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    half = max(1, int(seconds / 2 / 1.6e-3))
    for _ in range(half):
        torch.mm(a, b, out=out)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(half):
        torch.mm(a, b, out=out)
    end.record()
    end.synchronize()
    return 2 * MATMUL_SIZE**3 * half / start.elapsed_time(end) / 1e9


def beside_matmul(measure_it: Callable[[], Figure]) -> tuple[Figure, float]:
    """A compute-bound figure, and the mean of the matmul rates right before and right after it."""
    before = matmul_tflop_s()
    figure = measure_it()
    return figure, (before + matmul_tflop_s()) / 2


def launch_us(count: int = 2000) -> float:
    """What the CPU takes to launch one operation of torch's."""
    x = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        x.add_(1)
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / count * 1e6


def graph_node_us() -> float:
    """The least time from one operation to the next inside a CUDA graph."""
    x = torch.zeros(1, device="cuda")
    return graph_us([lambda: x.add_(1)] * 500)
