"""Which transport goes from which worker to which, and what the processes tell each other to build it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from nanopd.block_manager.cache import KVCache
from nanopd.config import ConfigError
from nanopd.workers.channel import Door, Hello, Receiver, Reception
from nanopd.workers.collective import CollectiveReceiver, CollectiveTransport
from nanopd.workers.memory import DeviceMemory, HostMemory, SharedMemory, share_device_memory
from nanopd.workers.network import LOOPBACK, Network
from nanopd.workers.peer import PeerTransport
from nanopd.workers.relay import PinnedRelayTransport, RelayReceiver
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
    door: Door | None  # where its receiver is found; None: it has none


class Links:
    """The transports from the workers of one process. Others' addresses come in by `learn`.

    Args:
        host: the process's number.
        transport: "auto" (the first that works of peer, relay and collective), or the one to be used between any two
            processes. Within a process it is always "local".
        device: of all caches of the process.
        network: to the other processes, where they may be on other machines: then "auto" is "collective", the only one that
            needs no memory which both sides can map.
    """

    def __init__(self, host: int, transport: str = "auto", device: torch.device | str = "cpu",
                 network: Network | None = None) -> None:
        if transport not in TRANSPORTS:
            raise ConfigError(f"transport must be one of {', '.join(TRANSPORTS)}, but is {transport!r}")
        self._host = host
        self._transport = "collective" if network is not None and transport == "auto" else transport
        self._network = network
        self._machine = LOOPBACK if network is None else network.address
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._reception: Reception | None = None
        self._caches: dict[str, KVCache] = {}
        self._shared: list[SharedMemory] = []
        self._addresses: dict[str, Address] = {}
        self._transports: dict[tuple[str, str], Transport] = {}

    def publish(self, worker_id: str, cache: KVCache) -> Address:
        """Make a cache of this process reachable. On a CPU its data moves, and what it holds is lost.

        Raises TransferError where the transport that was asked for can't be had.
        """
        memory = self._share(cache)
        if self._reception is None and self._transport != "peer":
            self._reception = self._open_reception()
        address = Address(worker_id, self._host, self._device, tuple(cache.data.shape), cache.data.dtype, memory, self._own_door())
        self._caches[worker_id], self._addresses[worker_id] = cache, address
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
        if self._reception is not None:
            self._reception.forget(worker_id)

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
        if self._reception is not None:
            self._reception.close()
        for memory in self._shared:
            memory.close()
        self._transports.clear()
        self._shared.clear()
        self._caches.clear()
        self._addresses.clear()

    def _open_reception(self) -> Reception:
        if self._network is not None:
            return Reception(self._machine, self._receive, self._network.secret)
        return Reception(self._machine if self._transport == "collective" else None, self._receive)

    def _own_door(self) -> Door | None:
        """As others are told of it: not the secret of a network, which all know."""
        if self._reception is None:
            return None
        return self._reception.door if self._network is None else replace(self._reception.door, key=None)

    def _door_of(self, destination: Address) -> Door:
        if destination.door is None:
            raise TransferError(f"worker {destination.worker_id} receives nothing: it was started for the transport 'peer'")
        return destination.door if self._network is None else replace(destination.door, key=self._network.secret)

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
        failures = []
        for build in self._choices(source, destination):
            try:
                return build()
            except TransferError as error:
                failures.append(str(error))
        raise TransferError(f"nothing can be sent from {source_id} to {destination_id}: {'; '.join(failures)}")

    def _choices(self, source: Address, destination: Address) -> Iterator[Callable[[], Transport]]:
        """What is to be tried, the fastest first."""
        cache, ids = self._caches[source.worker_id], (source.worker_id, destination.worker_id)
        if self._transport in ("auto", "peer"):
            yield lambda: _peer(cache, source, destination)
        if self._transport in ("auto", "relay"):
            yield lambda: PinnedRelayTransport(cache, self._door_of(destination), *ids)
        if self._transport in ("auto", "collective"):
            yield lambda: CollectiveTransport(cache, self._door_of(destination), *ids, self._machine)

    def _receive(self, hello: Hello) -> Receiver:
        if hello.destination_id not in self._caches:
            raise TransferError(f"there is no worker {hello.destination_id} here")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this connection's thread: a new one starts with the first GPU
        cache = self._caches[hello.destination_id]
        if hello.transport == CollectiveTransport.name:
            return CollectiveReceiver(cache, hello.slot_bytes, hello.setup, self._machine)
        return RelayReceiver(cache, hello.setup)


def _peer(cache: KVCache, source: Address, destination: Address) -> PeerTransport:
    if destination.memory is None or not _can_reach(source.device, destination.device):
        raise TransferError(f"{source.device} can't reach the memory of {destination.worker_id} on {destination.device}")
    return PeerTransport(cache, destination.memory, destination.shape)


def _can_reach(device: torch.device, other: torch.device) -> bool:
    if device.type != other.type:
        return False
    return device == other or torch.cuda.can_device_access_peer(device, other)


def _without_blocks(address: Address) -> tuple[int, ...]:
    return address.shape[:2] + address.shape[3:]
