"""Transports between two processes with GPUs: the right bytes, behind what computes them, and memory given back.

With one GPU both processes use it, for the transports that can do so.
"""

from __future__ import annotations

import signal
import time
from functools import partial

import pytest
import torch
from workers.far_end import Handle, fill, make_cache

from nanopd.workers import channel
from nanopd.workers.checksum import checksum
from nanopd.workers.links import Links
from nanopd.workers.memory import SharedMemory
from nanopd.workers.relay import Ring
from nanopd.workers.transfer import TransferError

pytestmark = pytest.mark.gpu
FAR = f"cuda:{min(1, torch.cuda.device_count() - 1)}"
SHAPE = (4, 16, 8, 128)  # layers, block_size, kv_heads, head_dim
LAYERS, BLOCKS, FAR_BLOCKS = SHAPE[0], 64, 70
SLOT_BYTES = 2**20  # a layer of all blocks takes several
SECOND = 2 * 10**9  # cycles of a GPU, about
TRANSPORTS = ["peer", "relay", pytest.param(
    "collective", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs"))]


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    from nanopd.paged_attention.build import load_kernels

    assert load_kernels()


@pytest.fixture
def pair(monkeypatch):
    """pair(transport, ...): D0's process on another GPU, and the links and the cache of P0 on cuda:0 in this one."""
    far, links = Handle(), []
    monkeypatch.setattr(channel, "SLOT_BYTES", SLOT_BYTES)

    def start(transport, dtype=torch.bfloat16, device=FAR):
        far.address = far.start("D0", 1, transport, FAR_BLOCKS, dict(device=device, dtype=dtype, shape=SHAPE), SLOT_BYTES)
        cache = make_cache(BLOCKS, "cuda:0", dtype, SHAPE)
        links.append(Links(0, transport, "cuda:0"))
        addresses = {"P0": links[0].publish("P0", cache), "D0": far.address}
        links[0].learn(addresses)
        far.learn(addresses)
        fill(cache, 1)
        far.poison()
        return links[0], cache, far

    yield start
    for link in links:
        link.close()
    if far.alive:
        held = far.close()
        assert not held["mapped"] and not any(name.startswith("nanopd") for name in held)
    far.end()


def shuffled(count: int, number: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:number].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_by_layer", [True, False])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_scattered_blocks_arrive_and_nothing_else_is_touched(pair, transport, layer_by_layer, dtype):
    links, cache, far = pair(transport, dtype)
    source, destination = shuffled(BLOCKS, 50, 1), shuffled(FAR_BLOCKS, 50, 2)
    link = links.connect("P0", "D0")
    for layers in ([range(i, i + 1) for i in range(LAYERS)] if layer_by_layer else [range(LAYERS)]):
        ticket = link.send(layers, source, destination)
    assert ticket.wait(30) and ticket.wait(0) and link.name == transport
    there = far.data()
    assert torch.equal(there[:, :, destination], cache.data[:, :, source].float().cpu())
    assert there[:, :, sorted(set(range(FAR_BLOCKS)) - set(destination))].isnan().all()
    tokens = 50 * SHAPE[1] - 3
    assert far.checksum(destination, tokens) == checksum(cache, source, tokens)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_send_waits_for_what_was_queued_before_it_and_nobody_waits_for_the_send(pair, transport):
    links, cache, far = pair(transport)
    blocks = list(range(BLOCKS))
    link = links.connect("P0", "D0")
    assert link.send(range(LAYERS), blocks, blocks).wait(30)  # what is slow the first time is done
    cache.poison(blocks)
    expected = torch.randn(cache.data.shape, generator=torch.Generator().manual_seed(5)).to("cuda:0", torch.bfloat16)
    torch.cuda.synchronize()
    start = time.monotonic()
    torch.cuda._sleep(SECOND)
    for layer in range(LAYERS):
        cache.data[layer].copy_(expected[layer])
        ticket = link.send(range(layer, layer + 1), blocks, blocks)
    assert time.monotonic() - start < 0.3, "sending has waited for the GPU"
    assert not ticket.wait(0.01)
    assert ticket.wait(30)
    assert time.monotonic() - start > 0.4, "the kernel in front was not slow: this test shows nothing"
    assert torch.equal(far.data()[:, :, blocks], expected.float().cpu())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_sends_in_flight_arrive_in_order(pair, transport):
    links, cache, far = pair(transport)
    link = links.connect("P0", "D0")
    tickets = [link.send(range(LAYERS), [i % BLOCKS, (i + 1) % BLOCKS], [4, 6]) for i in range(200)]
    assert tickets[-1].wait(30) and all(ticket.wait(0) for ticket in tickets)
    assert torch.equal(far.data()[:, :, [4, 6]], cache.data[:, :, [199 % BLOCKS, 200 % BLOCKS]].float().cpu())


def test_a_relays_room_is_filled_again_only_when_it_is_empty():
    """Even where what empties the rooms is late, and what fills them could run ahead."""
    cache, pieces = make_cache(channel.SLOTS, "cuda:0", torch.bfloat16, SHAPE), range(channel.SLOTS)
    fill(cache, 1)
    expected, stream = cache.data.clone(), torch.cuda.Stream()
    shared = SharedMemory(channel.SLOTS * cache.bytes_per_block)
    ring = Ring(shared.data, cache)

    def move_late(move):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SECOND // 4)
            for i in pieces:
                move(range(LAYERS), [i], i)
        assert not stream.query(), "there was time for all of it: this test shows nothing"
        stream.synchronize()

    move_late(partial(ring.pack, computed=torch.cuda.current_stream().record_event()))
    for i, slot in enumerate(shared.data.view(channel.SLOTS, -1)):
        assert torch.equal(channel.view_blocks(slot, cache, range(LAYERS), 1), expected[:, :, i : i + 1].cpu()), f"slot {i}"
    cache.poison(pieces)
    move_late(ring.unpack)
    assert torch.equal(cache.data, expected)
    ring.close()
    shared.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_receiver_that_is_killed_harms_nobody_else(pair, transport):
    links, cache, far = pair(transport)
    link, blocks = links.connect("P0", "D0"), list(range(BLOCKS))
    link.send(range(LAYERS), blocks, blocks).wait(30)
    tickets = [link.send(range(LAYERS), blocks, blocks) for _ in range(100)]
    far.kill(signal.SIGKILL)
    far.process.wait()
    start = time.monotonic()
    for ticket in tickets:
        try:
            assert ticket.wait(30), "a ticket stays open"
        except TransferError as error:
            assert "gone" in str(error)
    links.forget("D0")
    assert time.monotonic() - start < 10
    with pytest.raises(TransferError, match="gone"):
        link.send(range(LAYERS), [0], [0])
    assert torch.ones(8, device="cuda:0").sum().item() == 8, "this process still computes"
    assert checksum(cache, blocks, 100) == checksum(cache, blocks, 100)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_memory_is_given_back(pair, transport, killed):
    def free() -> list[int]:
        torch.cuda.empty_cache()
        return [torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count())]

    if transport == "collective":
        _use_nccl_once()  # what a process keeps of NCCL is not a transport's
    torch.ones(1, device="cuda:0")
    before = free()
    links, cache, far = pair(transport)
    blocks = list(range(BLOCKS))
    links.connect("P0", "D0").send(range(LAYERS), blocks, blocks).wait(30)
    if killed:
        far.kill(signal.SIGKILL)
        far.process.wait()
        links.forget("D0")
    links.close()
    del links, cache, blocks
    if not killed:
        far.close()
        far.process.kill()
        far.process.wait()
    deadline = time.monotonic() + 10  # the driver takes a moment to clear up after a process
    while min(now - then for now, then in zip(free(), before, strict=True)) < -2**25 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert min(now - then for now, then in zip(free(), before, strict=True)) >= -2**25


def _use_nccl_once() -> None:
    first, second = (torch.ones(1, device=f"cuda:{device}") for device in range(2))
    torch.cuda.nccl.broadcast([first, second])
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)


def test_auto_maps_what_it_can_reach(pair):
    links, _, _ = pair("auto")
    reachable = FAR == "cuda:0" or torch.cuda.can_device_access_peer(0, 1)
    assert links.connect("P0", "D0").name == ("peer" if reachable else "relay")


def test_from_a_gpu_to_a_cpu(pair):
    links, cache, far = pair("auto", device="cpu")
    link = links.connect("P0", "D0")
    link.send(range(LAYERS), [3, 1], [2, 60]).wait(30)
    assert link.name == "relay"
    assert torch.equal(far.data()[:, :, [2, 60]], cache.data[:, :, [3, 1]].float().cpu())
