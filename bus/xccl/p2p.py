"""Point-to-point transport: arrays between two ranks, in the paper's eight steps (v6 section 2).

The cells and the ring of a link are in link.py, its ends in channel.py (C) and link.py (Python).

    1. `send` copies the array, chunk by chunk, into claimed slots; there is no intermediate buffer. 2. It
    finds the ring's address in its own metadata: the grant that the receiver wrote when it first turned to
    it. 3. It publishes `tail` in the receiver's data cell and rings.                                  SYNC:
    cell-whole 4. It waits on its own metadata for the ack. 5. `recv` waits until its own data cell shows
    records, and compares their event id with the caller's. 6. It copies slots into the caller's array, and
    publishes `head` after each half ring: both sides work at once. 7. It acknowledges the message in the
    sender's ack cell, rings and returns.                    SYNC: cell-whole 8. `send` sees the ack and
    returns.

A message is records with chunk_id 0, 1, 2, ...; the first names dtype and shape (message.py). A full ring is
backpressure, so a ring may be smaller than a message. A record with chunk_id 0 always begins a message:
records that do not continue the message being received are left over from a `send` that gave up, and are
skipped. An array of `pull_bytes_min` or more that lies in the sender's app area is not sent through the ring:
the receiver pulls it from there, in one copy. Other large arrays of `send` it reads in the sender's memory, where the
system lets it (bus/README.md): one copy again.

Two ranks that `send` to each other at the same time both wait until one of them calls `recv`: agree on an
order, or use `isend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.clock import Deadline
from bus.memory import _native
from bus.memory.segment import Segment
from bus.xccl.channel import ChannelSettings, LinkStats, Receiver, Sender
from bus.xccl.endpoint import Endpoint, Rank
from bus.xccl.handle import RecvHandle, SendHandle
from bus.xccl.link import Incoming, Outgoing, await_grant
from bus.xccl.message import POINTER, PUT, SLOT_BYTES_MIN, MessageHeader, check_array, check_out

__all__ = ["P2p", "SlowP2p", "check_out"]

EVENT_ID_MAX = 2**64 - 1
PULL_BYTES_MIN = 1024
READ_BYTES_MIN = 12 * 1024
SHARED_BYTES_MIN = 16 * 1024


def _check_ring(endpoint: Endpoint) -> None:
    if endpoint.p2p_ring.slot_bytes < SLOT_BYTES_MIN:
        raise ValueError(f"slot_bytes: {endpoint.p2p_ring.slot_bytes} must be at least {SLOT_BYTES_MIN}")


def _own_ring(endpoint: Endpoint, peer: Rank) -> int:
    offset = endpoint.ring_offset(peer)
    if offset is None:
        raise ValueError(f"peer: {peer} has no ring at {endpoint.me}; name it in p2p_peers")
    return offset


class P2p:
    """Point-to-point transport of one endpoint. One thread.

    Args:
        endpoint: owned and closed by the caller.
        message_bytes_max: larger announcements are refused as corrupt before anything is allocated.
        pull_bytes_min: from this size on, arrays that lie in the own app area are pulled by the receiver.
        read_bytes_min: from this size on, other arrays of `send` are read by the receiver in the own memory, if the
            system lets it; None = never.
        shared_bytes_min: from this size on, the sender of an array that is read may take part in the copy, from one
            and a half times the size on that of one that is pulled; None = never.

    What these sizes should be on a machine is measured by `xds bench bus --only thresholds`.

    A hot loop takes `sender(peer)` or `receiver(peer)` once and calls its `send` or `recv`, which are C.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        message_bytes_max: int = 1 << 30,
        pull_bytes_min: int = PULL_BYTES_MIN,
        read_bytes_min: int | None = READ_BYTES_MIN,
        shared_bytes_min: int | None = SHARED_BYTES_MIN,
    ) -> None:
        _check_ring(endpoint)
        self._endpoint = endpoint
        self._settings = ChannelSettings(message_bytes_max, pull_bytes_min, read_bytes_min, shared_bytes_min)
        self._senders: dict[Rank, Sender] = {}
        self._receivers: dict[Rank, Receiver] = {}
        endpoint.watch(self._retire)

    def _retire(self, rank: Rank) -> None:
        for channel in (self._senders.get(rank), self._receivers.get(rank)):
            if channel is not None:
                channel.is_retired = True

    def sender(self, peer: Rank) -> Sender:
        """Return the channel to `peer`. It opens with its first message."""
        channel = self._senders.get(peer)
        if channel is None:
            channel = self._senders[peer] = Sender(self._endpoint, peer, self._settings)
        return channel

    def receiver(self, peer: Rank) -> Receiver:
        """Return the channel from `peer`; it opens with its first call. ValueError if `peer` has no ring."""
        channel = self._receivers.get(peer)
        if channel is None:
            offset = _own_ring(self._endpoint, peer)
            channel = self._receivers[peer] = Receiver(self._endpoint, peer, self._settings, offset)
        return channel

    def send(self, array: npt.NDArray[Any], peer: Rank, event_id: int, deadline: Deadline) -> None:
        """Send `array` and wait until `peer` has received it.

        Args:
            array: up to 8 dimensions, any plain number dtype, C-contiguous; read only, may be reused after
            return. peer: a rank that has a ring for this one (its `p2p_peers`). event_id: u64 tag that the
            receiver must ask for. deadline: absolute, monotonic.

        Raises:
            PeerDied: the receiver has ended, or its address is unknown. It may have received the message.
            PeerStalled: the deadline passed, or the receiver gave up half-way. The message may still
            arrive, whole or not at all.
            SegmentCorrupt: the grant or the ack is outside its bounds.
            ValueError: `array` or `event_id` breaks its rule; nothing was sent.

        Blocks: yes, waits on the peer; releases the GIL. Order: messages to one peer arrive in the order
        sent. Source: paper v6 section 2, steps 1-4 and 8. Twin: `bus.xccl.reference.P2pReference`.
        """
        self._flushed(peer, deadline).send(array, event_id, deadline)

    def recv(
        self, out: npt.NDArray[Any] | None, peer: Rank, event_id: int, deadline: Deadline
    ) -> npt.NDArray[Any]:
        """Receive the next message of `peer`, which must carry `event_id`.

        Args:
            out: array to fill, C-contiguous, of the message's dtype and shape; None allocates one.
            peer: a rank in this endpoint's `p2p_peers`.
            event_id: the tag to expect.
            deadline: absolute, monotonic.

        Returns:
            `out`, or the new array: the caller's own.

        Raises:
            EventMismatch: the next message carries another tag; it stays, `discard` drops it. Truncated:
            the message has more bytes than `out`; it stays. PeerDied: the sender has ended, or its address
            is unknown. What it had sent whole is received first. PeerStalled: the deadline passed. Nothing
            was consumed, except that a message which had arrived in part is lost; its sender is told.
            SegmentCorrupt: a record or a position is outside its bounds.
            ValueError: `out` has another dtype or shape, or the message has several parts (it stays), or
            `peer` has no ring here. RuntimeError: an `irecv` from `peer` is pending.

        After an error `out` may be partly filled; if the sender was stopped while it wrote its share of a large
        array, which the error says, it may still be written to, and lives until that is over.
        Blocks: yes; releases the GIL.
        Source: paper v6 section 2, steps 5-7. Twin: `bus.xccl.reference.P2pReference`.
        """
        return self._idle(peer).recv(out, event_id, deadline)

    def send_parts(
        self, parts: Sequence[npt.NDArray[Any]], peer: Rank, event_id: int, deadline: Deadline
    ) -> None:
        """Send 1..65535 arrays as one message: received together or not at all. Otherwise as `send`."""
        self._flushed(peer, deadline).send_parts(list(parts), event_id, deadline)

    def recv_parts(self, peer: Rank, event_id: int, deadline: Deadline) -> list[npt.NDArray[Any]]:
        """Receive all parts of the next message (also of one by `send`). Otherwise as `recv`."""
        return self._idle(peer).recv_parts(event_id, deadline)

    def isend(self, array: npt.NDArray[Any], peer: Rank, event_id: int) -> SendHandle:
        """Begin to send and return at once. `array` must not change until the handle is done.

        ValueError: `array` or `event_id` breaks its rule. All else is raised by the handle. Never blocks.
        """
        if not 0 <= event_id <= EVENT_ID_MAX:
            raise ValueError(f"event_id: {event_id} is outside 0..{EVENT_ID_MAX}")
        check_array(array)
        return SendHandle(self._endpoint, self.sender(peer), peer, array, event_id)

    def irecv(self, out: npt.NDArray[Any] | None, peer: Rank, event_id: int) -> RecvHandle:
        """Begin to receive and return at once; messages go to handles in the order of their making.

        ValueError: `event_id` breaks its rule, or `peer` has no ring here. All else is raised by the handle.
        """
        if not 0 <= event_id <= EVENT_ID_MAX:
            raise ValueError(f"event_id: {event_id} is outside 0..{EVENT_ID_MAX}")
        return RecvHandle(self._endpoint, self.receiver(peer), peer, out, event_id)

    def probe(self, peer: Rank) -> tuple[int, MessageHeader] | None:
        """Return event id and header of the next message of `peer`, None if there is none. Never waits."""
        return self._idle(peer).probe()

    def discard(self, peer: Rank, deadline: Deadline) -> int:
        """Drop the next message of `peer`, acknowledge it, and return its event id. Errors as for `recv`."""
        return self._idle(peer).discard(deadline)

    def accept(self, peer: Rank) -> None:
        """Grant `peer` its ring without receiving, so that its `send` may begin. Errors as for `recv`."""
        self.receiver(peer).accept()

    def reserve(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, peer: Rank, event_id: int, deadline: Deadline
    ) -> npt.NDArray[Any]:
        """Zero-copy send: return an array in the receiver's ring, to be filled in place, then `commit`.

        Waits while the ring is full. ValueError if a slot cannot hold it. The array must not be used after
        `commit`. A second `reserve` returns the same slot again. Otherwise as `send`.
        """
        return self._flushed(peer, deadline).reserve(shape, dtype, event_id, deadline)

    def commit(self, peer: Rank, event_id: int, deadline: Deadline) -> None:
        """Send what was reserved and wait until `peer` has released it. RuntimeError if nothing was."""
        channel = self.sender(peer)
        channel.await_taken(channel.commit(event_id), event_id, deadline)

    def peek(self, peer: Rank, event_id: int, deadline: Deadline) -> npt.NDArray[Any]:
        """Zero-copy receive: return the next message in place, read only, until `release`.

        It lies in the own ring, or for arrays that are pulled in the sender's app area. ValueError if the
        message has several chunks or parts, or is to be read in the sender's memory (it stays). Otherwise as `recv`.
        """
        return self._idle(peer).peek(event_id, deadline)

    def release(self, peer: Rank, event_id: int) -> None:
        """Consume the message that was peeked at; its array must not be used any more."""
        self.receiver(peer).release(event_id)

    def put(
        self, array: npt.NDArray[Any], peer: Rank, offset: int, event_id: int, deadline: Deadline
    ) -> None:
        """Store `array` at `offset` of `peer`'s app area, then notify: one copy.

        The notice is a message; `recv` copies the bytes out of the app area, `peek` shows them there. That
        nobody else uses the range is up to the callers. ValueError if it leaves the app area. Otherwise as
        `send`; `reserve`d slots are lost.
        """
        check_array(array)
        channel = self._flushed(peer, deadline)
        segment = self._endpoint.peer(peer, event_id)
        start = _app_range(segment, offset, array.nbytes)
        header = MessageHeader(array.dtype, array.shape, PUT)
        tag, extension = header.pack()
        content = extension + POINTER.pack(start)
        slot = channel.reserve((len(content),), np.uint8, event_id, deadline)
        if channel.segment is not segment:
            raise self._endpoint.died(peer, event_id, "a newer incarnation has replaced it")
        _native.copy(segment.buf, start, array.reshape(-1).view(np.uint8).data, 0, array.nbytes)
        slot[:] = np.frombuffer(content, np.uint8)
        channel._publish(tag, len(content), event_id)
        channel.await_taken(channel.tail, event_id, deadline)

    def get(self, out: npt.NDArray[Any], peer: Rank, offset: int) -> None:
        """Copy from `offset` of `peer`'s app area into `out`. One-sided: `peer` does not notice.

        ValueError if the range leaves the app area, PeerDied if `peer` has ended. Order: none but that of a
        message received before.
        """
        check_array(out)
        segment = self._endpoint.peer(peer)
        self._endpoint.check_alive(peer, segment, 0)
        start = _app_range(segment, offset, out.nbytes)
        _native.copy(out.reshape(-1).view(np.uint8).data, 0, segment.buf, start, out.nbytes)

    def stats(self) -> dict[tuple[Rank, str], LinkStats]:
        """Return the counters of every channel, by peer and "send" or "recv"."""
        sent = {(peer, "send"): channel.stats() for peer, channel in self._senders.items()}
        return sent | {(peer, "recv"): channel.stats() for peer, channel in self._receivers.items()}

    def close(self) -> None:
        """Drop all links, so that the endpoint's mappings can go. Idempotent."""
        self._endpoint.unwatch(self._retire)
        for sender in self._senders.values():
            sender._close()
        for receiver in self._receivers.values():
            receiver._close()
        self._senders.clear()
        self._receivers.clear()

    def _flushed(self, peer: Rank, deadline: Deadline) -> Sender:
        """Return the channel once all `isend`s before have been pushed, so that the order is kept."""
        channel = self.sender(peer)
        if channel.queue:
            channel.queue[-1].push(deadline)
        return channel

    def _idle(self, peer: Rank) -> Receiver:
        channel = self.receiver(peer)
        if channel.queue:
            raise RuntimeError(f"recv: {len(channel.queue)} irecv from {peer} are pending")
        return channel


def _app_range(segment: Segment, offset: int, num_bytes: int) -> int:
    layout = segment.layout
    if not 0 <= offset <= layout.app_bytes - num_bytes:
        raise ValueError(f"offset: {num_bytes} bytes at {offset} leave an app area of {layout.app_bytes}")
    return layout.app_offset + offset


class SlowP2p:
    """`send` and `recv` of `P2p` in Python: the same bytes in the same places, step by step. One thread."""

    def __init__(self, endpoint: Endpoint, *, message_bytes_max: int = 1 << 30) -> None:
        _check_ring(endpoint)
        self._endpoint = endpoint
        self._message_bytes_max = message_bytes_max
        self._outgoing: dict[Rank, Outgoing] = {}
        self._incoming: dict[Rank, Incoming] = {}

    def send(self, array: npt.NDArray[Any], peer: Rank, event_id: int, deadline: Deadline) -> None:
        """See `P2p.send`."""
        if not 0 <= event_id <= EVENT_ID_MAX:
            raise ValueError(f"event_id: {event_id} is outside 0..{EVENT_ID_MAX}")
        check_array(array)
        self.outgoing(peer, event_id, deadline).send(array, event_id, deadline)

    def recv(
        self, out: npt.NDArray[Any] | None, peer: Rank, event_id: int, deadline: Deadline
    ) -> npt.NDArray[Any]:
        """See `P2p.recv`."""
        return self.incoming(peer, event_id).recv(out, event_id, deadline, self._message_bytes_max)

    def outgoing(self, peer: Rank, event_id: int, deadline: Deadline) -> Outgoing:
        """Return the link to the peer's newest incarnation; waits for its grant."""
        segment = self._endpoint.peer(peer, event_id)
        link = self._outgoing.get(peer)
        if link is None or link.segment is not segment:
            offset, layout = await_grant(self._endpoint, peer, segment, event_id, deadline)
            link = self._outgoing[peer] = Outgoing(self._endpoint, peer, segment, offset, layout)
        return link

    def incoming(self, peer: Rank, event_id: int) -> Incoming:
        """Return the link from the peer's newest incarnation."""
        offset = _own_ring(self._endpoint, peer)
        segment = self._endpoint.peer(peer, event_id)
        link = self._incoming.get(peer)
        if link is None or link.segment is not segment:
            link = self._incoming[peer] = Incoming(self._endpoint, peer, segment, offset)
        return link
