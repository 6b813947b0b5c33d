"""multiprocessing.Pipe: a Unix socket pair; `send_bytes`, and `recv_bytes_into` the receiver's array."""

from __future__ import annotations

from contextlib import ExitStack
from multiprocessing.connection import Client, Connection, Listener

import numpy as np

from bus.bench.meeting import Meeting, Message
from bus.bench.pingpong import Ends, Link


class Pipe:
    """A connection as `multiprocessing.Pipe()` gives it, made between processes that are not parent and child."""

    def __init__(self, connection: Connection, size_max: int) -> None:
        self._connection = connection
        self._out, self._into = np.ones(size_max, np.uint8), np.ones(size_max, np.uint8)

    def ends(self, num_bytes: int) -> Ends:
        """See `Link`."""
        connection, out, into = self._connection, self._out[:num_bytes], self._into[:num_bytes]
        return Ends(connection.send_bytes, (out,), connection.recv_bytes_into, (into,), lambda: out.fill(7))


def open_pairs(meeting: Meeting, stack: ExitStack, size_max: int, options: Message) -> dict[str, Link]:
    """Return the link with the partner."""
    address = str(meeting.folder / f"pipe-{meeting.rank & ~1}")
    if meeting.rank & 1:
        meeting.gather()
        connection = Client(address, family="AF_UNIX")
    else:
        listener = stack.enter_context(Listener(address, family="AF_UNIX"))
        meeting.gather()
        connection = listener.accept()
    stack.enter_context(connection)
    return {"Pipe": Pipe(connection, size_max)}
