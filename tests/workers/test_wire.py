"""Messages between processes: whole, in order, and nobody waits for ever."""

from __future__ import annotations

import socket
import threading
from multiprocessing.connection import wait

import pytest

from nanopd.workers.wire import Wire, wait_for, wait_for_room

BIG = 8 * 2**20  # bytes: far more than a socket holds


@pytest.fixture
def ends():
    both = [Wire(end) for end in socket.socketpair()]
    yield both
    for end in both:
        end.close()


def test_messages_arrive_whole_and_in_order(ends):
    here, there = ends
    messages = [b"", "text", {"a": [1, 2]}, bytes(1000), *range(100)]
    for message in messages:
        here.send(message)
    wait_for([there], 5)
    assert there.receive() == messages
    assert there.receive() == []


def test_sending_never_waits_and_what_is_big_comes_in_pieces(ends):
    here, there = ends
    here.send(bytes(BIG))
    here.send("after it")
    assert here.has_unsent
    arrived = []
    while len(arrived) < 2:
        wait_for([here, there], 5)
        here.flush()
        arrived += there.receive()
    assert arrived == [bytes(BIG), "after it"]
    assert not here.has_unsent


def test_big_messages_both_ways_at_once(ends):
    """As parent and host do: the one keeps what the socket does not take, the other has a thread that reads."""
    parent, host = ends
    heard, spoken = [], []

    def listen():
        while len(heard) < 3:
            wait([host])
            heard.extend(host.receive())

    def speak():
        for _ in range(3):
            host.send(bytes(BIG))
            wait_for_room(host)

    threads = [threading.Thread(target=target, daemon=True) for target in (listen, speak)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        parent.send(bytes(BIG))
    while len(spoken) < 3 or parent.has_unsent:
        wait_for([parent], 5)
        parent.flush()
        spoken += parent.receive()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert [len(message) for message in heard + spoken] == [BIG] * 6


def test_what_was_sent_before_the_end_is_still_received(ends):
    here, there = ends
    here.send("last words")
    here.close()
    assert there.receive() == ["last words"]
    with pytest.raises(EOFError):
        there.receive()
    there.send("to nobody")
    there.send("to nobody")
    assert not there.has_unsent
    wait_for_room(there)  # and whoever would wait for room does not


def test_an_end_that_goes_in_the_middle_of_a_message(ends):
    here, there = ends
    here.send(bytes(BIG))
    here.close()
    with pytest.raises(EOFError):
        there.receive()
