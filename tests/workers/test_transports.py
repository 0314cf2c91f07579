"""Transports between two real processes: the right bytes in the right places, and nothing left whoever dies when."""

from __future__ import annotations

import signal
import tempfile
import time
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Client
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from workers.far_end import GLOO, LAYERS, Handle, fill, leftovers, make_cache
from workers.processes import stop
from workers.serving import MIX, assert_nothing_leaked, assert_tokens_equal_reference, serve_mix

from nanopd.block_manager.cache import KVCache
from nanopd.config import ConfigError
from nanopd.workers import channel
from nanopd.workers.checksum import checksum
from nanopd.workers.links import Links
from nanopd.workers.memory import SharedMemory
from nanopd.workers.transfer import TransferError

ALL, TWO_SIDED = ("peer", "relay", "collective"), ("relay", "collective")
BLOCKS, FAR_BLOCKS = 8, 9
LAYER_BYTES = 2 * 4 * 2 * 6 * 4  # of one block, float32
SMALL_SLOT = 3 * LAYER_BYTES


def named_things() -> set[str]:
    """What a dead process could leave behind for others to see."""
    return {str(path) for folder in ("/dev/shm", tempfile.gettempdir()) for path in Path(folder).iterdir()
            if folder == "/dev/shm" or any(word in path.name for word in ("nanopd", "pymp", "torch", "listener"))}


class Near:
    """This process's side: worker P0, or whatever it is called."""

    def __init__(self, transport, worker_id="P0", **options):
        self.cache = make_cache(BLOCKS, **options)
        self.worker_id = worker_id
        self.links = Links(0, transport)
        self.address = self.links.publish(worker_id, self.cache)
        fill(self.cache, 1)

    def send(self, destination_id, *what):
        return self.links.connect(self.worker_id, destination_id).send(*what)


@pytest.fixture(scope="module", autouse=True)
def own_folder(tmp_path_factory):
    """For temporary files of these tests alone: others leave theirs in the usual one meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        patch.setenv("TMPDIR", tempfile.tempdir)
        yield


@pytest.fixture(scope="module")
def living():
    """A process that the last test has left alive: each takes seconds to start."""
    processes: list[Handle] = []
    yield processes
    for process in processes:
        assert process.end() == ""


@pytest.fixture
def pair(monkeypatch, living):
    """pair(transport, ...) starts D0 in a process of its own and gives it with P0, acquainted."""
    far = living.pop() if living else Handle()
    held, named, nears = leftovers(), named_things(), []

    def start(transport, slot_bytes=SMALL_SLOT, far_id="D0", near_id="P0", **options):
        monkeypatch.setattr(channel, "SLOT_BYTES", slot_bytes)
        far.address = far.start(far_id, 1, transport, FAR_BLOCKS, options, slot_bytes)
        near = Near(transport, near_id, **options)
        nears.append(near)
        addresses = {far_id: far.address, near_id: near.address}
        near.links.learn(addresses)
        far.learn(addresses)
        far.poison()
        return near, far

    yield start
    if far.alive:
        assert not far.close(), "the other process still holds something after close()"
        living.append(far)
    else:
        assert far.end() == ""
    for near in nears:
        near.links.close()
        near.links.close()  # twice does no harm
        vars(near).clear()
    for _ in range(100):  # gloo's threads end a moment later
        if not leftovers() - held - GLOO:
            break
        time.sleep(0.02)
    assert not leftovers() - held - GLOO
    assert named_things() <= named


# ------------------------------------------------------------------------------------------------------ the bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_by_layer", [True, False])
@pytest.mark.parametrize("transport", ALL)
def test_scattered_blocks_arrive_and_nothing_else_is_touched(pair, transport, layer_by_layer, dtype):
    near, far = pair(transport, dtype=dtype)
    source, destination = [6, 0, 3, 7, 1], [8, 2, 5, 0, 7]
    for layers in ([range(i, i + 1) for i in range(LAYERS)] if layer_by_layer else [range(LAYERS)]):
        ticket = near.send("D0", layers, source, destination)
    assert ticket.wait(20) and ticket.wait(0)
    there = far.data()
    assert torch.equal(there[:, :, destination], near.cache.data[:, :, source].float())
    assert there[:, :, [1, 3, 4, 6]].isnan().all()
    assert near.links.connect("P0", "D0").name == transport


@pytest.mark.parametrize("transport", ALL)
def test_checksums_agree_until_a_bit_flips(pair, transport):
    near, far = pair(transport)
    source, destination, tokens = [6, 0, 3], [8, 2, 5], 10
    near.send("D0", range(LAYERS), source, destination).wait()
    sent = checksum(near.cache, source, tokens)
    assert far.checksum(destination, tokens) == sent
    far.flip_bit(LAYERS - 1, 2, 17)
    assert far.checksum(destination, tokens) != sent
    near.send("D0", range(LAYERS), source, destination).wait()  # sent again, it is whole again
    assert far.checksum(destination, tokens) == sent


@pytest.mark.parametrize("transport", ALL)
def test_many_sends_in_flight_arrive_in_order(pair, transport):
    near, far = pair(transport)
    tickets = [near.send("D0", range(LAYERS), [i % BLOCKS, (i + 1) % BLOCKS], [4, 6]) for i in range(100)]
    assert tickets[-1].wait(20)
    assert all(ticket.wait(0) for ticket in tickets)
    assert torch.equal(far.data()[:, :, [4, 6]], near.cache.data[:, :, [99 % BLOCKS, 100 % BLOCKS]])


@pytest.mark.parametrize("transport", ALL)
def test_both_directions_at_once(pair, transport):
    near, far = pair(transport)
    far.fill(2)
    for _ in range(20):
        ticket = near.send("D0", range(LAYERS), [0, 1], [7, 8])
        far.send("P0", range(LAYERS), [0, 1], [6, 7])
    assert ticket.wait(20) and far.wait()
    there = far.data()
    assert torch.equal(there[:, :, [7, 8]], near.cache.data[:, :, [0, 1]])
    assert torch.equal(near.cache.data[:, :, [6, 7]], there[:, :, [0, 1]])


@settings(deadline=None)
@given(first=st.integers(0, LAYERS - 1), count=st.integers(1, 40), fitting=st.integers(1, 50), data=st.data())
def test_pieces_fit_a_slot_and_cover_each_block_of_each_layer_once(first, count, fitting, data):
    cache, layers = make_cache(1), range(first, data.draw(st.integers(first + 1, LAYERS)))
    pieces = channel.split(cache, layers, count, fitting * LAYER_BYTES + data.draw(st.integers(0, LAYER_BYTES - 1)))
    covered = [(layer, block) for some, places in pieces for layer in some for block in range(count)[places]]
    assert covered == [(layer, block) for layer in layers for block in range(count)]
    assert all(len(some) * len(range(count)[places]) <= fitting for some, places in pieces)


def test_a_peers_send_is_a_fixed_number_of_operations(pair):
    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    near, _ = pair("peer")
    near.links.connect("P0", "D0")
    counts = []
    for blocks in (range(1), range(BLOCKS)):
        with Operations() as operations:
            near.send("D0", range(LAYERS), list(blocks), list(blocks))
        counts.append(operations.count)
    assert counts[0] == counts[1] <= 8


# ------------------------------------------------------------------------------------------------- who dies when


@pytest.mark.parametrize("transport", TWO_SIDED)
def test_open_tickets_fail_when_the_receiver_is_killed(pair, transport):
    near, far = pair(transport)
    assert near.send("D0", range(LAYERS), [0], [0]).wait(20)
    stop(far.process.pid)
    tickets = [near.send("D0", range(LAYERS), [0, 1, 2], [3, 4, 5]) for _ in range(50)]  # many times the slots
    assert not tickets[-1].wait(0.1)
    far.kill(signal.SIGKILL)
    far.process.wait()
    start = time.monotonic()
    for ticket in tickets:
        try:
            assert ticket.wait(20)  # some may have arrived before
        except TransferError as error:
            assert "gone" in str(error)
    with pytest.raises(TransferError, match="gone"):
        tickets[-1].wait()
    with pytest.raises(TransferError, match="gone"):
        near.send("D0", range(LAYERS), [0], [0])
    near.links.forget("D0")
    with pytest.raises(TransferError, match="D0 is gone"):
        near.send("D0", range(LAYERS), [0], [0])
    assert time.monotonic() - start < 5


def test_a_peer_that_is_killed_is_written_to_until_it_is_forgotten(pair):
    near, far = pair("peer")
    transport = near.links.connect("P0", "D0")
    far.kill(signal.SIGKILL)
    far.process.wait()
    assert transport.send(range(LAYERS), [0], [0]).wait()  # into memory that nobody reads
    near.links.forget("D0")
    for send in (lambda: transport.send(range(LAYERS), [0], [0]), lambda: near.send("D0", range(LAYERS), [0], [0])):
        with pytest.raises(TransferError, match="gone"):
            send()


@pytest.mark.parametrize("transport", ALL)
def test_who_is_killed_before_the_first_send_can_not_be_reached(pair, transport):
    near, far = pair(transport)
    far.kill(signal.SIGKILL)
    far.process.wait()
    with pytest.raises(TransferError, match="nothing can be sent from P0 to D0"):
        near.send("D0", range(LAYERS), [0], [0])


@pytest.mark.parametrize("transport", ALL)
def test_nothing_is_written_after_a_killed_sender_is_forgotten(pair, transport, monkeypatch):
    def slow_unpack(*arguments):  # so that there is something left to do when the sender is dead
        time.sleep(0.1)
        unpack(*arguments)

    near, far = pair(transport, far_id="P1", near_id="D1")
    unpack = KVCache.unpack
    monkeypatch.setattr(KVCache, "unpack", slow_unpack)
    far.fill(2)
    for _ in range(30):
        far.send("D1", range(LAYERS), [0, 1, 2], [0, 1, 2])
    far.kill(signal.SIGKILL)
    far.process.wait()
    start = time.monotonic()
    near.links.forget("P1")
    assert time.monotonic() - start < 5
    near.cache.poison(range(BLOCKS))
    time.sleep(0.3)
    assert near.cache.data.isnan().all()


@pytest.mark.parametrize("transport", TWO_SIDED)
def test_close_with_sends_under_way_ends_their_tickets(pair, transport):
    near, far = pair(transport)
    near.send("D0", range(LAYERS), [0], [0]).wait()
    stop(far.process.pid)
    tickets = [near.send("D0", range(LAYERS), [0, 1, 2], [3, 4, 5]) for _ in range(50)]
    near.links.close()
    with pytest.raises(TransferError):
        tickets[-1].wait(20)
    far.kill(signal.SIGCONT)


@pytest.mark.parametrize("transport", TWO_SIDED)
@pytest.mark.parametrize("source, destination, message", [(0, 1000, "could not be stored"), (1000, 0, "could not be sent")])
def test_an_error_at_either_end_is_told(pair, transport, source, destination, message):
    near, _ = pair(transport)
    good = near.send("D0", range(LAYERS), [0], [0])
    ticket = near.send("D0", range(LAYERS), [source], [destination])
    with pytest.raises(TransferError, match=message):
        ticket.wait(20)
    assert good.wait(0), "what was sent before has arrived"


@pytest.mark.parametrize("transport", TWO_SIDED)
def test_nothing_spins(pair, transport):
    near, _ = pair(transport)
    near.send("D0", range(LAYERS), [0], [0]).wait()
    start = time.process_time()
    time.sleep(1)
    assert time.process_time() - start < 0.02


# ------------------------------------------------------------------------------------------------------ the workers


@pytest.mark.parametrize("transport", ALL)
def test_workers_give_the_references_tokens(reference, transport):
    """Workers of one process that are linked as if each had its own."""
    with reference.cluster(topology="P:cpu P:cpu D:cpu D:cpu", prefill_chunk_size=7) as cluster:
        links = {worker_id: Links(host, transport) for host, worker_id in enumerate(cluster.workers)}
        addresses = {worker_id: links[worker_id].publish(worker_id, worker.cache) for worker_id, worker in cluster.workers.items()}
        for worker_id, worker in cluster.workers.items():
            worker.cache.poison(range(worker.cache.num_blocks))
            links[worker_id].learn(addresses)
            worker._connect = partial(links[worker_id].connect, worker_id)
        for _ in range(2):  # the second time from warm prefix caches
            assert_tokens_equal_reference(serve_mix(cluster), MIX, reference)
        assert_nothing_leaked(cluster)
        records = [record for worker in cluster.workers.values() for record in worker.sent]
        assert len(records) > len(MIX) and {record.transport for record in records} == {transport}
        for link in links.values():
            link.close()


# ------------------------------------------------------------------------------------------------------ strangers


def test_a_stranger_is_not_let_in_and_holds_nobody_up(pair):
    near, far = pair("relay")
    silent, wrong = Client(far.address.door.address), Client(far.address.door.address)
    wrong.recv_bytes()
    wrong.send_bytes(b"let me in")
    assert near.send("D0", range(LAYERS), [0], [0]).wait(5)
    assert wrong.poll(5)
    with pytest.raises((EOFError, OSError)):
        while True:
            wrong.recv_bytes()
    near.guest = silent  # who keeps nobody from closing: the fixture does it now


# ------------------------------------------------------------------------------------------------------- choosing


def test_auto_maps_the_memory_of_another_process(pair):
    near, _ = pair("auto")
    assert near.links.connect("P0", "D0").name == "peer"
    assert near.links.connect("P0", "D0") is near.links.connect("P0", "D0")


@pytest.mark.parametrize("missing, chosen", [(("memory",), "relay"), (("memory", "ring"), "collective")])
def test_auto_takes_the_next_best_where_memory_can_not_be_mapped(pair, monkeypatch, missing, chosen):
    near, far = pair("auto")
    near.links.learn({"D0": replace(far.address, memory=None)})
    if "ring" in missing:
        monkeypatch.delattr("os.memfd_create")  # as on macOS
    assert near.links.connect("P0", "D0").name == chosen
    near.send("D0", range(LAYERS), [3], [4]).wait(20)
    assert torch.equal(far.data()[:, :, 4], near.cache.data[:, :, 3])


@pytest.mark.parametrize("transport", ("auto", *ALL))
def test_within_a_process_it_is_local(transport):
    links, source, destination = Links(0, transport), make_cache(BLOCKS), make_cache(FAR_BLOCKS)
    links.publish("P0", source)
    links.publish("D0", destination)
    fill(source, 1)
    link = links.connect("P0", "D0")
    link.send(range(LAYERS), [1, 2], [8, 0]).wait()
    assert link.name == "local"
    assert torch.equal(destination.data[:, :, [8, 0]], source.data[:, :, [1, 2]])
    links.close()


def test_what_can_not_be_is_said_in_words(pair, monkeypatch):
    with pytest.raises(ConfigError, match="must be one of auto, peer, relay, collective, but is 'pigeon'"):
        Links(0, "pigeon")
    near, far = pair("peer")
    other = make_cache(BLOCKS, shape=(LAYERS, 8, 2, 6))
    near.links.publish("P9", other)
    with pytest.raises(TransferError, match="P9 and D0 hold different models, types or block sizes"):
        near.links.connect("P9", "D0")
    with pytest.raises(TransferError, match="worker D7 is gone"):
        near.links.connect("P0", "D7")
    monkeypatch.delattr("os.memfd_create")
    with pytest.raises(TransferError, match="on Linux only: choose the transport 'collective'"):
        SharedMemory(100)
