"""pyzmq over ipc: a PAIR socket between each two ranks. Large messages are handed over without a copy at the sender."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from bus.bench.meeting import Meeting, Message
from bus.bench.pingpong import Ends, Link
from bus.bench.rows import MessageWay, RowsWay

Bytes = npt.NDArray[np.uint8]


class Socket:
    """A PAIR socket."""

    def __init__(self, socket: zmq.Socket[bytes], size_max: int) -> None:
        self._socket = socket
        self._out, self._into = np.ones(size_max, np.uint8), np.ones(size_max, np.uint8)

    def ends(self, num_bytes: int) -> Ends:
        """See `Link`."""
        socket, out, into = self._socket, self._out[:num_bytes], self._into[:num_bytes]
        is_large = num_bytes >= zmq.COPY_THRESHOLD

        def recv() -> None:
            into[:] = np.frombuffer(socket.recv(copy=False).buffer, np.uint8)

        return Ends(socket.send, (out, 0, not is_large), recv, (), lambda: out.fill(7))


class Mesh:
    """Sockets to all other ranks; see `bus.bench.rows.Transport`."""

    def __init__(self, rank: int, sockets: dict[int, zmq.Socket[bytes]]) -> None:
        self._rank, self._sockets = rank, sockets

    def swap_equal(self, out: Bytes, into: Bytes) -> None:
        """See `Transport`."""
        sizes = [out.size // (len(self._sockets) + 1)] * (len(self._sockets) + 1)
        self.swap(out, sizes, into, sizes)

    def swap(self, out: Bytes, sent: list[int], into: Bytes, received: list[int]) -> None:
        """See `Transport`."""
        ends = np.cumsum(sent).tolist()
        for other, socket in self._sockets.items():
            part = out[ends[other] - sent[other] : ends[other]]
            socket.send(part.data, 0, sent[other] < zmq.COPY_THRESHOLD)
        at = 0
        for other, size in enumerate(received):
            if other == self._rank:
                into[at : at + size] = out[ends[other] - sent[other] : ends[other]]
            else:
                into[at : at + size] = np.frombuffer(self._sockets[other].recv(copy=False).buffer, np.uint8)
            at += size


def open_pairs(meeting: Meeting, stack: ExitStack, size_max: int, options: Message) -> dict[str, Link]:
    """Return the link with the partner."""
    sockets = _connect(meeting, stack, [meeting.rank ^ 1])
    return {"pyzmq": Socket(sockets[meeting.rank ^ 1], size_max)}


def open_rows(meeting: Meeting, stack: ExitStack, options: Message) -> dict[str, RowsWay]:
    """Return the way among all ranks."""
    others = [rank for rank in range(meeting.num_ranks) if rank != meeting.rank]
    mesh = Mesh(meeting.rank, _connect(meeting, stack, others))
    return {"pyzmq": MessageWay(mesh, meeting)}


def _connect(meeting: Meeting, stack: ExitStack, others: list[int]) -> dict[int, Any]:
    context = zmq.Context()
    stack.callback(context.destroy, linger=0)
    sockets = {}
    for other in others:
        low, high = sorted((meeting.rank, other))
        address = f"ipc://{meeting.folder}/{low}-{high}-{meeting.num_ranks}"
        socket = sockets[other] = context.socket(zmq.PAIR)
        socket.set_hwm(0)
        if meeting.rank == low:
            socket.bind(address)
        else:
            socket.connect(address)
    meeting.gather()
    return sockets
