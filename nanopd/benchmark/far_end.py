"""The other process of `nanopd bench transfer`: a cache that the transports write to, and what is asked of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from nanopd.block_manager.cache import KVCache
from nanopd.models.loader import load_spec
from nanopd.paged_attention.build import load_kernels
from nanopd.workers.checksum import checksum
from nanopd.workers.links import Address, Links
from nanopd.workers.process import environment_of_child
from nanopd.workers.wire import Wire, wait_for, wait_for_room

BLOCK_SIZE = 16
PATIENCE = 300.0  # seconds for an answer: the kernels may have to be compiled


def make_cache(model: str, num_blocks: int, device: str) -> KVCache:
    """A cache as workers have it for a model, with zeros in it."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    cache = KVCache(load_spec(model), num_blocks, BLOCK_SIZE, device, dtype)
    cache.data.zero_()
    return cache


class FarEnd:
    """The process, seen from the one that measures. Its arguments are those of `make_cache`."""

    def __init__(self, *cache: Any) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._wire = Wire(ours)
            descriptor = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from nanopd.benchmark.far_end import main; main({descriptor})"],
                pass_fds=[descriptor], stdin=subprocess.DEVNULL, start_new_session=True, env=environment_of_child())
        self._wire.send(cache)

    def publish(self, transport: str) -> Address:
        """Make the cache reachable, in this way and no longer in the one before. Raises TransferError."""
        return self._ask("publish", transport)

    def checksum(self, block_ids: list[int]) -> int:
        return self._ask("checksum", block_ids)

    def close(self) -> None:
        self._wire.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, method: str, argument: Any) -> Any:
        self._wire.send((method, argument))
        wait_for([self._wire], PATIENCE)
        try:
            answers = self._wire.receive()
        except EOFError:
            raise RuntimeError(f"the other process is gone, with exit code {self._process.wait()}") from None
        if not answers:
            raise RuntimeError(f"the other process did not answer for {PATIENCE:g} s")
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]


class _Cache:
    def __init__(self, model: str, num_blocks: int, device: str) -> None:
        if device != "cpu":
            torch.cuda.set_device(device)
            load_kernels()
        self._cache = make_cache(model, num_blocks, device)
        self._links: Links | None = None

    def publish(self, transport: str) -> Address:
        if self._links is not None:
            self._links.close()
        self._links = Links(1, transport, self._cache.data.device)
        return self._links.publish("D0", self._cache)

    def checksum(self, block_ids: list[int]) -> int:
        return checksum(self._cache, block_ids, len(block_ids) * BLOCK_SIZE)


def main(descriptor: int) -> None:
    """The process. Ends when its parent has hung up, or is gone."""
    wire = Wire(socket.socket(fileno=descriptor))
    messages = _messages(wire)
    cache = _Cache(*next(messages))
    for method, argument in messages:
        try:
            answer = getattr(cache, method)(argument)
        except Exception as error:
            answer = error
        wire.send(answer)
        wait_for_room(wire)
    os._exit(0)


def _messages(wire: Wire) -> Iterator[Any]:
    """Until the parent has hung up."""
    while True:
        wait_for([wire])
        try:
            yield from wire.receive()
        except EOFError:
            return
