"""How long the GPU takes, without what the CPU adds to each launch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

ROTATED_BYTES = 2**28  # several times the largest L2 cache: what a call reads has left the cache since its last turn
MOST_CALLS = 2000  # in one graph
LAUNCH_CYCLES = 1_000_000  # about half a millisecond
Call = Callable[[], object]
Pick = Callable[[list[float]], float]


def num_sets(set_bytes: int, most: int = 128) -> int:
    """How many sets of buffers to rotate through so that none is found in the cache."""
    return max(1, min(most, -(-ROTATED_BYTES // set_bytes)))


def graph_us(calls: Sequence[Call], *, replays: int = 7, least_us: float = 2000.0, pick: Pick = statistics.median) -> float:
    """Microseconds a call, in the median replay of a CUDA graph that makes all calls in turn, for `least_us` or longer.

    For a ceiling `pick` the best replay, `min`.
    """
    rough = _span_us(capture(calls).replay)
    rounds = max(1, min(MOST_CALLS // len(calls), math.ceil(least_us / rough)))
    graph = capture(list(calls) * rounds)
    return pick([_span_us(graph.replay) for _ in range(replays)]) / (rounds * len(calls))


def eager_us(calls: Sequence[Call], *, repeats: int = 7, least_us: float = 10_000.0,
             pick: Pick = statistics.median) -> list[float]:
    """Microseconds of each call, launched without a graph: for what takes much longer than its launch.

    The calls take turns, `least_us` each: a GPU's clock falls as it heats up, and whoever came first would meet another
    one than whoever came last.
    """
    counts = [_count_for(call, least_us) for call in calls]
    turns = [[_span_us(partial(_repeat, call, count)) / count for call, count in zip(calls, counts)] for _ in range(repeats)]
    return [pick(list(spans)) for spans in zip(*turns)]


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of the calls. Each runs once before, so that nothing is compiled in there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _count_for(call: Call, least_us: float) -> int:
    call()
    return max(2, math.ceil(least_us / _span_us(call)))


def _repeat(call: Call, count: int) -> None:
    for _ in range(count):
        call()


def _span_us(work: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(LAUNCH_CYCLES)  # the GPU is busy until the work is queued: its launch does not count
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
