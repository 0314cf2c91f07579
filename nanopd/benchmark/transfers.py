"""How fast blocks of a KV cache go from one process's device to another's, beside the simplest copies of as many bytes."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanopd.benchmark.far_end import BLOCK_SIZE, FarEnd, make_cache
from nanopd.benchmark.show import progress
from nanopd.block_manager.cache import KVCache
from nanopd.paged_attention.build import load_kernels
from nanopd.workers.checksum import checksum
from nanopd.workers.links import Links
from nanopd.workers.transfer import Ticket, TransferError, Transport

TRANSPORTS = ("peer", "relay", "collective")
LARGE_BYTES = 64e6  # from here on the rate counts, and no longer the latency
MOST_ROUNDS = 64
TURNS = 5
LATENCIES = 100


@dataclass(frozen=True)
class Case:
    """What is measured on a kind of device."""

    model: str  # whose cache it is
    source: str
    destination: str
    num_blocks: int  # in each cache; those that are sent lie scattered in there
    counts: tuple[int, ...]  # of blocks in a send
    least_bytes: int  # in one timing


CASES = {
    "cuda": Case("qwen3-8b", "cuda:0", "cuda:1", 4096, (1, 4, 16, 32, 64, 256, 1024, 2048), 2**30),
    "cpu": Case("tiny", "cpu", "cpu", 2048, (1, 16, 128, 1024), 2**25),
}


def run(case: Case) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, Any]]:
    """Ceilings, rows and summary. Every row stands beside a copy of as many bytes, measured in turn with it."""
    if case.source != "cpu":
        torch.cuda.set_device(case.source)
        load_kernels()  # the other process finds them built
    with closing(FarEnd(case.model, case.num_blocks, case.destination)) as far:
        cache = make_cache(case.model, case.num_blocks, case.source)
        copies = Copies(case, max(case.counts) * cache.bytes_per_block)
        progress("plain copies")
        ceilings = copies.ceilings()
        rows, latencies, missing = [], {}, {}
        for transport in TRANSPORTS:
            progress(f"{transport}: connecting {case.source} to {case.destination}")
            links = Links(0, transport, cache.data.device)
            with closing(links):
                try:
                    link = _connect(links, cache, far, transport)
                except TransferError as error:
                    missing[transport] = str(error)
                    continue
                _check(link, cache, far)
                latencies[transport] = latency_us(link)
                rows += rows_of(link, cache, case, copies)
    return ceilings, rows, _summary(rows, latencies, missing, ceilings)


def _connect(links: Links, cache: KVCache, far: FarEnd, transport: str) -> Transport:
    address = far.publish(transport)
    links.learn({"P0": links.publish("P0", cache), "D0": address})
    return links.connect("P0", "D0")


def _check(link: Transport, cache: KVCache, far: FarEnd) -> None:
    """Fast is good if it arrives."""
    source, destination = _scattered(64, cache.num_blocks, 2)
    cache.data.normal_()
    link.send(range(cache.num_layers), source, destination).wait()
    if far.checksum(destination) != checksum(cache, source, 64 * BLOCK_SIZE):
        raise RuntimeError(f"{link.name}: what arrived is not what was sent")


# --------------------------------------------------------------------------------------------- what is measured


def rows_of(link: Transport, cache: KVCache, case: Case, copies: Copies) -> Iterator[dict[str, Any]]:
    """A row for each number of blocks, sent whole or one layer at a time."""
    for pieces in ("whole", "layers"):
        for count in case.counts:
            progress(f"{link.name}, {pieces}: {count} blocks")
            size = count * cache.bytes_per_block
            rounds = max(1, min(MOST_ROUNDS, math.ceil(case.least_bytes / size)))
            send = partial(_send, link, cache.num_layers, *_scattered(count, cache.num_blocks, count), pieces == "layers")
            sent, copied = in_turns(partial(_send_rounds, send, rounds), partial(copies.copy, size, rounds))
            yield {"transport": link.name, "pieces": pieces, "blocks": count, "mb": size / 1e6, "ms": sent / rounds * 1e3,
                   "gb_s": size * rounds / sent / 1e9, "copy_gb_s": size * rounds / copied / 1e9, "share": copied / sent}


def latency_us(link: Transport) -> float:
    """From the call that sends one layer of one block to its arrival; the median."""
    seconds = [_seconds(lambda: link.send(range(1), [0], [0]).wait()) for _ in range(LATENCIES)]
    return statistics.median(seconds) * 1e6


def _send(link: Transport, num_layers: int, source: list[int], destination: list[int], layer_by_layer: bool) -> Ticket:
    if not layer_by_layer:
        return link.send(range(num_layers), source, destination)
    for layer in range(num_layers):
        ticket = link.send(range(layer, layer + 1), source, destination)
    return ticket


def _send_rounds(send: Callable[[], Ticket], rounds: int) -> None:
    for _ in range(rounds):
        ticket = send()
    ticket.wait()


class Copies:
    """The simplest copies between the two devices, from one contiguous buffer to another."""

    def __init__(self, case: Case, size: int) -> None:
        self._source = torch.ones(size, dtype=torch.uint8, device=case.source)
        self._destination = torch.ones(size, dtype=torch.uint8, device=case.destination)

    def copy(self, size: int, rounds: int) -> None:
        """torch's copy_ from device to device: over NVLink where there is some."""
        self._repeat(self._destination[:size], self._source[:size], rounds)

    def ceilings(self) -> dict[str, float]:
        """The best of several. "pinned": from the source's GPU to pinned host memory, and from there to the destination's."""
        size = min(2**28, len(self._source))
        pairs = {"peer_copy_gb_s": (self._destination[:size], self._source[:size])}
        if self._source.is_cuda:
            host = torch.ones(size, dtype=torch.uint8, pin_memory=True)
            pairs |= {"pinned_to_host_gb_s": (host, self._source[:size]), "pinned_to_gpu_gb_s": (self._destination[:size], host)}
        return {name: 8 * size / min(_seconds(lambda pair=pair: self._repeat(*pair, 8)) for _ in range(TURNS)) / 1e9
                for name, pair in pairs.items()}

    def _repeat(self, destination: Tensor, source: Tensor, rounds: int) -> None:
        for _ in range(rounds):
            destination.copy_(source, non_blocking=True)
        for tensor in (source, destination):
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)


def in_turns(*calls: Callable[[], object]) -> list[float]:
    """Seconds of each, the median of several turns; each has run once before."""
    for call in calls:
        call()
    turns = [[_seconds(call) for call in calls] for _ in range(TURNS)]
    return [statistics.median(seconds) for seconds in zip(*turns)]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _scattered(count: int, num_blocks: int, seed: int) -> tuple[list[int], list[int]]:
    """Source and destination blocks, no two side by side but by chance."""
    draw = random.Random(seed)
    return draw.sample(range(num_blocks), count), draw.sample(range(num_blocks), count)


# ------------------------------------------------------------------------------------------------------ summary


def _summary(rows: list[dict[str, Any]], latencies: dict[str, float], missing: dict[str, str],
             ceilings: dict[str, float]) -> dict[str, Any]:
    """The least of what large sends reach: whole ones, and one layer at a time where a layer alone is large."""
    summary: dict[str, Any] = {"latency_us": latencies}
    with suppress(ValueError):
        summary["peer_share_of_copy"] = min(row["share"] for row in rows if _is_large(row, "peer"))
    if "pinned_to_host_gb_s" in ceilings:
        hop = min(ceilings["pinned_to_host_gb_s"], ceilings["pinned_to_gpu_gb_s"])
        with suppress(ValueError):
            summary["relay_share_of_pinned"] = min(row["gb_s"] for row in rows if _is_large(row, "relay")) / hop
    return summary | ({"not_possible": missing} if missing else {})


def _is_large(row: dict[str, Any], transport: str) -> bool:
    return row["transport"] == transport and row["pieces"] == "whole" and row["mb"] * 1e6 >= LARGE_BYTES
