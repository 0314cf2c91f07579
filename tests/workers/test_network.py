"""Connections between machines: who knows the secret is let in, and nobody else; caches get across, and times are ours.

Two addresses of this machine stand for two machines: what listens on one of them does not hear what is sent to the other.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import AuthenticationError

import pytest
import torch
from workers.far_end import LAYERS, fill, make_cache
from workers.processes import wait_until

from nanopd.core import StepRecord, TokenEvent, TransferRecord
from nanopd.messages import AskHistory, History, Pong, Tokens
from nanopd.workers.collective import _open_store
from nanopd.workers.host import HostSpec
from nanopd.workers.links import Links
from nanopd.workers.network import Gate, Network, call_at
from nanopd.workers.process import HostProcess
from nanopd.workers.transfer import TransferError
from nanopd.workers.wire import Wire, wait_for, wait_for_end

HERE, THERE = "127.0.0.1", "127.0.0.2"
SECRET = bytes(range(32))


@pytest.fixture
def gate():
    gate = Gate(Network(HERE, SECRET))
    yield gate
    gate.close()


@contextmanager
def calling(gate, number=0, secret=SECRET):
    """A call from another thread, as a future."""
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(call_at, gate.address, number, secret)


# ----------------------------------------------------------------------------------------------------- the gate


def test_who_knows_the_secret_is_let_in(gate):
    with calling(gate, number=3) as call:
        guest = gate.admit(5)
        there = Wire(call.result())
    here = Wire(guest.connection)
    assert guest.number == 3 and abs(guest.clock_ahead) < 0.5
    there.send({"large": bytes(2**20)})
    assert wait_until(lambda: there.flush() or here.receive() == [{"large": bytes(2**20)}])
    for end in (guest.connection, there._socket):
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) and end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    threading.Timer(0.1, there.close).start()
    wait_for_end(here)  # of TCP this is told otherwise than of a socket pair
    with pytest.raises(EOFError):
        here.receive()


def test_who_does_not_know_it_is_turned_away(gate):
    with calling(gate, secret=b"guess") as call:
        assert gate.admit(5) is None
        with pytest.raises(AuthenticationError):
            call.result()


def test_nothing_that_a_stranger_sends_is_unpickled(gate):
    class Bomb:
        def __reduce__(self):
            return exploded.append, (True,)

    exploded: list[bool] = []
    bomb = pickle.dumps(Bomb())
    with socket.create_connection(gate.address) as stranger:
        stranger.sendall(struct.pack("!i", len(bomb)) + bomb)
        assert gate.admit(5) is None
    with socket.create_connection(gate.address) as stranger:
        stranger.sendall(struct.pack("!i", 2**30))  # no room is made for what it announces
        assert gate.admit(5) is None
    assert not exploded


def test_a_gate_where_nobody_comes_does_not_wait_for_ever(gate):
    start = time.monotonic()
    assert gate.admit(0.1) is None
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("opened", [lambda: Gate(Network(HERE, SECRET)).address[1], lambda: store().port], ids=["gate", "store"])
def test_it_listens_on_one_address_only(opened):
    port = opened()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((THERE, port), 5)


def store(kept=[]):  # noqa: B006 - it listens as long as it lives
    kept.append(_open_store(HERE))
    return kept[-1]


# --------------------------------------------------------------------------------------------------- the caches


@pytest.fixture
def ends():
    """Links and caches of two machines, P0's here and D0's there. `ends(secret)`: the secret that the one there knows."""
    with ExitStack() as stack:
        def make(secret=SECRET):
            near, far = Links(0, network=Network(HERE, SECRET)), Links(1, network=Network(THERE, secret))
            stack.callback(near.close)
            stack.callback(far.close)
            caches = make_cache(8), make_cache(9)
            addresses = {"P0": near.publish("P0", caches[0]), "D0": far.publish("D0", caches[1])}
            fill(caches[0], 1)
            for links in (near, far):
                links.learn(addresses)
            return near, *caches, addresses["D0"]

        yield make


def test_blocks_travel_by_the_only_way_that_needs_no_common_memory(ends):
    links, source, destination, address = ends()
    link = links.connect("P0", "D0")
    assert link.name == "collective" and address.memory is None and address.door.address[0] == THERE
    assert link.send(range(LAYERS), [1, 2, 5], [8, 0, 3]).wait(20)
    assert torch.equal(destination.data[:, :, [8, 0, 3]], source.data[:, :, [1, 2, 5]])


def test_a_door_is_told_of_without_its_key(ends):
    *_, address = ends()
    assert address.door.key is None and SECRET not in pickle.dumps(address)


def test_a_sender_of_another_cluster_is_not_let_in(ends):
    links, _, destination, _ = ends(secret=bytes(32))
    destination.data.fill_(1.0)
    with pytest.raises(TransferError, match="D0 did not answer"):
        links.connect("P0", "D0")
    assert destination.data.eq(1.0).all()


# ---------------------------------------------------------------------------------------------------- the clock


class Elsewhere:
    """A process whose clock says 100 s more."""

    clock_ahead = 100.0

    def __init__(self, connection):
        self.wire = Wire(connection)


def test_times_are_told_by_our_clock():
    ours, theirs = socket.socketpair()
    host, there = HostProcess(HostSpec(0, {"D0": "D"}, "cpu", "", None, None, "", 0, None, "", False), Elsewhere(ours)), Wire(theirs)
    host.tell(("D0", AskHistory(since=5.0)))
    wait_for([there])
    assert there.receive()[1] == ("D0", AskHistory(since=105.0))
    step = StepRecord(1, 107.0, (), (), 0, 8, 0, 0.25)
    sent = TransferRecord("r", "D0", "collective", 4, 64, 107.0, 108.0, 109.0)
    there.send([("D0", Tokens([TokenEvent("r", token_id=7, time=106.0)])), ("D0", History([step], [sent])), (None, Pong())])
    wait_for([host.wire])
    (_, tokens), (_, history), pong = host.receive()
    assert tokens.events == [TokenEvent("r", token_id=7, time=6.0)]
    assert (history.steps[0].start, history.steps[0].duration) == (7.0, 0.25)
    assert [(each.start, each.computed, each.end) for each in history.transfers] == [(7.0, 8.0, 9.0)]
    assert pong == (None, Pong())
    host.wire.close()
    there.close()
