"""Which transport goes from which worker to which, and what the processes tell each other to build it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanopd.block_manager.cache import KVCache
from nanopd.config import ConfigError
from nanopd.workers.memory import DeviceMemory, HostMemory, SharedMemory, share_device_memory
from nanopd.workers.peer import PeerTransport
from nanopd.workers.transfer import LocalTransport, TransferError, Transport

TRANSPORTS = ("auto", "peer", "relay", "collective")


@dataclass(frozen=True)
class Address:
    """Where a worker's cache is, and how others reach it."""

    worker_id: str
    host: int
    device: torch.device
    shape: tuple[int, ...]  # of the cache's data
    dtype: torch.dtype
    memory: HostMemory | DeviceMemory | None  # None: can't be mapped, or need not be


class Links:
    """The transports from the workers of one process. Others' addresses come in by `learn`.

    Args:
        host: the process's number.
        transport: "auto", or one to be used between any two processes. Within a process it is always "local".
    """

    def __init__(self, host: int, transport: str = "auto", device: torch.device | str = "cpu") -> None:
        if transport not in TRANSPORTS:
            raise ConfigError(f"transport must be one of {', '.join(TRANSPORTS)}, but is {transport!r}")
        self._host = host
        self._transport = transport
        self._device = torch.device(device)
        self._caches: dict[str, KVCache] = {}
        self._shared: list[SharedMemory] = []
        self._addresses: dict[str, Address] = {}
        self._transports: dict[tuple[str, str], Transport] = {}

    def publish(self, worker_id: str, cache: KVCache) -> Address:
        """Make a cache of this process reachable. On a CPU its data moves, and what it holds is lost.

        Raises TransferError where the transport that was asked for can't be had.
        """
        self._caches[worker_id] = cache
        address = Address(worker_id, self._host, self._device, tuple(cache.data.shape), cache.data.dtype, self._share(cache))
        self._addresses[worker_id] = address
        return address

    def learn(self, addresses: dict[str, Address]) -> None:
        """All workers', once all are ready."""
        self._addresses.update(addresses)

    def connect(self, source_id: str, destination_id: str) -> Transport:
        """The transport from a worker of this process to another one. Raises TransferError."""
        pair = source_id, destination_id
        if pair not in self._transports:
            self._transports[pair] = self._build(source_id, destination_id)
        return self._transports[pair]

    def forget(self, worker_id: str) -> None:
        """That worker is gone: nothing goes there any more, and from its side nothing is written here once this returns."""
        self._addresses.pop(worker_id, None)
        self._caches.pop(worker_id, None)
        for pair in [pair for pair in self._transports if worker_id in pair]:
            self._transports.pop(pair).close()

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
        for memory in self._shared:
            memory.close()
        self._transports.clear()
        self._shared.clear()
        self._caches.clear()
        self._addresses.clear()

    def _share(self, cache: KVCache) -> HostMemory | DeviceMemory | None:
        if self._transport not in ("auto", "peer"):
            return None
        try:
            if cache.data.is_cuda:
                return share_device_memory(cache.data)
            shared = SharedMemory(cache.data.nbytes)
            cache.data = shared.data.view(cache.data.dtype).view(cache.data.shape)
            self._shared.append(shared)
            return shared.address
        except TransferError:
            if self._transport == "peer":
                raise
            return None

    def _build(self, source_id: str, destination_id: str) -> Transport:
        if destination_id not in self._addresses:
            raise TransferError(f"worker {destination_id} is gone")
        source, destination = self._addresses[source_id], self._addresses[destination_id]
        if source.dtype != destination.dtype or _without_blocks(source) != _without_blocks(destination):
            raise TransferError(f"the caches of {source_id} and {destination_id} hold different models, types or block sizes")
        if source.host == destination.host:
            return LocalTransport(self._caches[source_id], self._caches[destination_id])
        return self._peer(source_id, destination)

    def _peer(self, source_id: str, destination: Address) -> Transport:
        if destination.memory is None:
            raise TransferError(f"the memory of worker {destination.worker_id} can't be mapped by other processes")
        return PeerTransport(self._caches[source_id], destination.memory, destination.shape)


def _without_blocks(address: Address) -> tuple[int, ...]:
    return address.shape[:2] + address.shape[3:]
