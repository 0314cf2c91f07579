"""Which transport carries blocks from one worker's cache to another's."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import torch

from nanopd.block_manager.cache import KVCache
from nanopd.workers.transfer import LocalTransport, TransferError, Transport

TRANSPORTS = ("auto", "peer", "relay", "collective")


@dataclass(frozen=True)
class Address:
    """Where a worker's cache is, and how another process maps it."""

    worker_id: str
    host: int
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Links:
    """The ways from this process's workers to all others."""

    def __init__(self, host: int, transport: str = "auto", device: torch.device | str = "cpu") -> None:
        self._host = host
        self._addresses: dict[str, Address] = {}
        self._caches: dict[str, KVCache] = {}
        self._files: list[int] = []

    def publish(self, worker_id: str, cache: KVCache) -> Address:
        file = os.memfd_create(f"nanopd-{worker_id}")
        self._files.append(file)
        os.ftruncate(file, cache.data.nbytes)
        shape, dtype = tuple(cache.data.shape), cache.data.dtype
        cache.data = _mapped(file, shape, dtype)
        self._caches[worker_id] = cache
        return Address(worker_id, self._host, f"/proc/{os.getpid()}/fd/{file}", shape, dtype)

    def learn(self, addresses: dict[str, Address]) -> None:
        self._addresses.update(addresses)

    def connect(self, source_id: str, destination_id: str) -> Transport:
        if destination_id not in self._caches:
            self._caches[destination_id] = self._map(destination_id)
        return LocalTransport(self._caches[source_id], self._caches[destination_id])

    def forget(self, worker_id: str) -> None:
        self._addresses.pop(worker_id, None)
        self._caches.pop(worker_id, None)

    def close(self) -> None:
        self._caches.clear()
        for file in self._files:
            os.close(file)
        self._files.clear()

    def _map(self, worker_id: str) -> KVCache:
        if worker_id not in self._addresses:
            raise TransferError(f"{worker_id} is gone")
        address = self._addresses[worker_id]
        file = os.open(address.file, os.O_RDWR)
        try:
            cache = object.__new__(KVCache)
            cache.num_blocks, cache.block_size = address.shape[2:4]
            cache.data = _mapped(file, address.shape, address.dtype)
            return cache
        finally:
            os.close(file)


def _mapped(file: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, 0), dtype=dtype).view(shape)
