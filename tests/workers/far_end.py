"""A second process with a worker's cache and links, and a handle to call it by: python far_end.py DESCRIPTOR."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from nanopd.block_manager.cache import KVCache
from nanopd.workers import channel
from nanopd.workers.checksum import checksum
from nanopd.workers.links import Links

GLOO = Counter(pipe=2)  # that a process which has used gloo keeps
ROOT = Path(__file__).parents[2]
LAYERS, BLOCK_SIZE, KV_HEADS, HEAD_DIM = 3, 4, 2, 6


def make_cache(num_blocks: int, device="cpu", dtype=torch.float32, shape=(LAYERS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)) -> KVCache:
    layers, *block = shape
    return KVCache.of(torch.empty(layers, 2, num_blocks, *block, device=device, dtype=dtype))


def fill(cache: KVCache, seed: int) -> None:
    cache.data.copy_(torch.randn(cache.data.shape, generator=torch.Generator().manual_seed(seed)))


def leftovers() -> Counter:
    """What a process holds: threads, open files by what they are, and mapped memory of ours."""
    held = Counter(thread.name for thread in threading.enumerate())
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that listed them
            held[os.readlink(descriptor).split(":")[0]] += 1
    held["mapped"] = Path("/proc/self/maps").read_text().count("memfd:nanopd-")
    return held


class FarEnd:
    """What the process can be asked to do. Answers must be picklable."""

    def start(self, worker_id, host, transport, num_blocks, options, slot_bytes):
        channel.SLOT_BYTES = slot_bytes
        self.before = leftovers()
        self.cache = make_cache(num_blocks, **options)
        self.worker_id = worker_id
        self.tickets = []
        self.links = Links(host, transport, self.cache.data.device)
        return self.links.publish(worker_id, self.cache)

    def learn(self, addresses):
        self.links.learn(addresses)

    def fill(self, seed):
        fill(self.cache, seed)

    def poison(self):
        self.cache.poison(range(self.cache.num_blocks))

    def send(self, destination_id, layers, source_blocks, destination_blocks):
        self.tickets.append(self.links.connect(self.worker_id, destination_id).send(layers, source_blocks, destination_blocks))

    def wait(self):
        return self.tickets[-1].wait()

    def numbers(self):
        return self.cache.data.float().cpu().clone().numpy()  # a tensor would not travel without more of torch's machinery

    def checksum(self, block_ids, num_tokens):
        return checksum(self.cache, block_ids, num_tokens)

    def flip_bit(self, layer, block, byte):
        self.cache.data[layer, 0, block].view(torch.uint8).flatten()[byte] ^= 1

    def close(self):
        """What is held now and was not before."""
        self.links.close()
        del self.cache, self.tickets
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return leftovers() - self.before - GLOO


class Handle:
    """The other process, seen from here. `handle.method(...)` calls FarEnd's and gives its answer."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment,
            stderr=subprocess.PIPE, text=True)
        theirs.close()
        self.connection = Connection(ours.detach())

    def data(self):
        """Its cache's content, in float32."""
        return torch.from_numpy(self.numbers())

    def __getattr__(self, method):
        def call(*arguments):
            self.connection.send((method, arguments))
            assert self.connection.poll(60), f"{method} did not answer"
            answer = self.connection.recv()
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def kill(self, signal_number):
        self.process.send_signal(signal_number)

    @property
    def alive(self):
        return self.process.poll() is None

    def end(self):
        """Let it end, if it has not been killed. Returns what it has said on stderr."""
        self.connection.close()
        stderr = self.process.communicate(timeout=60)[1]
        assert self.process.returncode in (0, -9), stderr
        return stderr


def main(descriptor: int) -> None:
    connection, far_end = Connection(descriptor), FarEnd()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(far_end, method)(*arguments)
        except Exception as error:
            answer = error
        connection.send(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
