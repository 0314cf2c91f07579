"""Messages between two processes, over a socket that nobody else has.

They are Python objects, pickled: both ends run this code, and what comes in was sent by the other end.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

from nanopd.interrupts import uninterrupted

LENGTH = struct.Struct("!Q")
PIECE = 2**18  # bytes for the socket at a time
END = select.POLLHUP | getattr(select, "POLLRDHUP", 0)  # of TCP, whose two directions end one by one


class Wire:
    """Whole messages, in order. Never waits: what the socket does not take is kept, and `flush` tries again.

    One thread may receive while another sends.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._piece = memoryview(bytearray(PIECE))  # what is read goes here first: a buffer for each look would cost more
        self._incoming = bytearray()
        self._outgoing = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        return bool(self._outgoing)

    def send(self, message: Any) -> None:
        """To an end that is gone: dropped. `receive` is who says so."""
        data = ForkingPickler.dumps(message)
        with uninterrupted():
            self._outgoing += LENGTH.pack(len(data))
            self._outgoing += data
            self.flush()

    def flush(self) -> None:
        with uninterrupted():
            try:
                while self._outgoing:
                    del self._outgoing[: self._socket.send(self._outgoing[:PIECE])]
            except BlockingIOError:
                pass
            except OSError:
                self._outgoing.clear()

    def receive(self) -> list[Any]:
        """All that has arrived. Raises EOFError when the other end is gone and all that it had sent was returned."""
        with uninterrupted():
            is_open = self._fill()
            messages = list(self._cut())
        if not messages and not is_open:
            raise EOFError
        return messages

    def close(self) -> None:
        self._socket.close()

    def _fill(self) -> bool:
        """Read what is there. Returns whether there may be more later."""
        try:
            while count := self._socket.recv_into(self._piece):
                self._incoming += self._piece[:count]
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def _cut(self) -> Iterator[Any]:
        start = 0
        while len(self._incoming) - start >= LENGTH.size:
            end = start + LENGTH.size + LENGTH.unpack_from(self._incoming, start)[0]
            if end > len(self._incoming):
                break
            yield ForkingPickler.loads(self._incoming[start + LENGTH.size : end])
            start = end
        del self._incoming[:start]


def wait_for(wires: Iterable[Wire], timeout: float | None = None) -> set[int]:
    """Sleep until one of them has something to receive or room for what it could not send, or `timeout` seconds.

    Returns the file numbers of those that have.
    """
    poll = select.poll()
    for wire in wires:
        poll.register(wire, select.POLLIN | (select.POLLOUT if wire.has_unsent else 0))
    return {number for number, _ in poll.poll(None if timeout is None else timeout * 1000)}


def wait_for_room(wire: Wire) -> None:
    """Sleep until the wire has sent everything, or its other end is gone."""
    poll = select.poll()
    poll.register(wire, select.POLLOUT)
    while wire.has_unsent:
        poll.poll()
        wire.flush()


def wait_for_end(wire: Wire) -> None:
    """Sleep until the other end is gone, whatever there is to receive."""
    poll = select.poll()
    poll.register(wire, END)
    while not any(event & (END | select.POLLERR) for _, event in poll.poll()):
        pass
