"""Connections between processes that need not be on one machine: who is let in, and what time it is on the other side."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

LOOPBACK = "127.0.0.1"
ANSWER_TIME = 10.0  # seconds that the other side has for its part of the greeting
ADMISSION_TIME = 60.0  # seconds that a gate has: others may be at it
SILENCE = 15  # seconds until the system looks whether the other side's machine is still there; and between two looks
LOOKS = 3  # that it does not answer
EXCHANGES = 8  # of the time; the quickest one counts
NUMBER, TIME = struct.Struct("!I"), struct.Struct("!d")


@dataclass(frozen=True)
class Network:
    """How processes on several machines reach one another."""

    address: str  # of this machine, as the others know it
    secret: bytes = field(repr=False)  # known to the processes of one cluster alone. It never goes over a connection of ours


@dataclass(frozen=True)
class Guest:
    """Who was let in."""

    number: int
    connection: socket.socket
    clock_ahead: float  # seconds that its monotonic clock is ahead of ours


class Gate:
    """Lets in processes that know the secret. Listens on one address only, and only as long as somebody is expected."""

    def __init__(self, network: Network) -> None:
        self._secret = network.secret
        self._listener = socket.create_server((network.address, 0))

    @property
    def address(self) -> tuple[str, int]:
        return self._listener.getsockname()

    def admit(self, timeout: float) -> Guest | None:
        """Whoever comes within `timeout` seconds; None also where it is a stranger."""
        if not select.select([self._listener], [], [], timeout)[0]:
            return None
        caller, _ = self._listener.accept()
        with suppress(Exception), Connection(caller.detach()) as connection:  # what a stranger may say has no bounds
            limit_waiting(connection, ANSWER_TIME)
            let_in(connection, self._secret)
            number, clock_ahead = NUMBER.unpack(connection.recv_bytes(NUMBER.size))[0], _clock_ahead(connection)
            return Guest(number, _watched(connection), clock_ahead)
        return None

    def close(self) -> None:
        self._listener.close()


def call_at(gate: tuple[str, int], number: int, secret: bytes) -> socket.socket:
    """A connection to another process's gate. Raises OSError or EOFError where it can't be reached, AuthenticationError where the
    secrets differ."""
    caller = socket.create_connection(gate, ADMISSION_TIME)
    caller.settimeout(None)
    with Connection(caller.detach()) as connection:
        limit_waiting(connection, ADMISSION_TIME)
        ask_in(connection, secret)
        connection.send_bytes(NUMBER.pack(number))
        for _ in range(EXCHANGES):
            connection.recv_bytes(0)
            connection.send_bytes(TIME.pack(time.monotonic()))
        return _watched(connection)


def _clock_ahead(connection: Connection) -> float:
    """What the other side says, less the middle of the time that it took to ask. The quickest answer is off by the least."""
    found = []
    for _ in range(EXCHANGES):
        asked = time.monotonic()
        connection.send_bytes(b"")
        theirs = TIME.unpack(connection.recv_bytes(TIME.size))[0]
        answered = time.monotonic()
        found.append((answered - asked, theirs - (asked + answered) / 2))
    return min(found)[1]


def _watched(connection: Connection) -> socket.socket:
    """The same connection, for good: it ends also when the other side's machine is gone without a word."""
    send_at_once(connection)
    watched = socket_of(connection)
    watched.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", SILENCE), ("TCP_KEEPINTVL", SILENCE), ("TCP_KEEPCNT", LOOKS)):
        if hasattr(socket, option):  # not everywhere under this name
            watched.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return watched


def let_in(connection: Connection, secret: bytes) -> None:
    """Both sides show that they know the secret, by answering a question that only it answers; who has come goes first.
    Nothing is unpickled. Raises AuthenticationError, or what comes of nonsense."""
    deliver_challenge(connection, secret)
    answer_challenge(connection, secret)


def ask_in(connection: Connection, secret: bytes) -> None:
    """The other side of `let_in`."""
    answer_challenge(connection, secret)
    deliver_challenge(connection, secret)


def limit_waiting(connection: Connection, seconds: float) -> None:
    """How long reading may wait before it fails with an OSError; 0: for ever."""
    with socket_of(connection) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), 0))


def hang_up(connection: Connection) -> None:
    """End a connection that other threads may be using: they wake up to its end."""
    with suppress(OSError), socket_of(connection) as other:
        other.shutdown(socket.SHUT_RDWR)


def send_at_once(connection: Connection) -> None:
    """Small messages don't wait until the one before has been acknowledged. No effect where that is never so."""
    with socket_of(connection) as other:
        if other.family != socket.AF_UNIX:
            other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def socket_of(connection: Connection) -> socket.socket:
    """The same connection once more. To be closed by itself."""
    return socket.socket(fileno=os.dup(connection.fileno()))
