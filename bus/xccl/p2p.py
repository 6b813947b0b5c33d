"""Point-to-point transport: arrays between two ranks, in the paper's eight steps (v6 section 2).

The cells and the ring of a link are in link.py.

    1. `send` copies the array, chunk by chunk, into claimed slots; there is no intermediate buffer. 2. It
    finds the ring's address in its own metadata: the grant that the receiver wrote when it first turned to
    it. 3. It publishes `tail` in the receiver's data cell and rings.                                  SYNC:
    cell-whole 4. It waits on its own metadata for the ack. 5. `recv` waits until its own data cell shows
    records, and compares their event id with the caller's. 6. It copies slots into the caller's array, and
    publishes `head` after each half ring: both sides work at once. 7. It acknowledges the message in the
    sender's ack cell, rings and returns.                    SYNC: cell-whole 8. `send` sees the ack and
    returns.

A message is records with chunk_id 0, 1, 2, ...; the first begins with a header that names dtype and shape
(message.py). A full ring is backpressure, so a ring may be smaller than a message. A record with chunk_id 0
always begins a message: records that do not continue the message being received are left over from a `send`
that gave up, and are skipped.

Two ranks that `send` to each other at the same time both wait until one of them calls `recv`: agree on an
order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bus.clock import Deadline
from bus.errors import EventMismatch, SegmentCorrupt, Truncated
from bus.memory import _native
from bus.memory.ring import Record
from bus.xccl.endpoint import Endpoint, Rank
from bus.xccl.link import Incoming, Outgoing
from bus.xccl.message import HEADER_BYTES, MessageHeader, check_array

EVENT_ID_MAX = 2**64 - 1


def check_out(out: npt.NDArray[Any], header: MessageHeader, *, rank: str, peer: str, event_id: int) -> None:
    """Raise Truncated if the message has more bytes than `out`, ValueError if dtype or shape differ."""
    check_array(out)
    if header.num_bytes > out.nbytes:
        text = f"the message has {header.num_bytes} bytes, the buffer {out.nbytes}"
        raise Truncated(text, rank=rank, peer=peer, event_id=event_id)
    if (out.dtype, out.shape) != (header.dtype, header.shape):
        raise ValueError(f"out: {out.dtype} {out.shape} must be the message's {header.dtype} {header.shape}")


class P2p:
    """Point-to-point transport of one endpoint. One thread.

    Args:
        endpoint: owned and closed by the caller.
        message_bytes_max: larger announcements are refused as corrupt before anything is allocated.
    """

    def __init__(self, endpoint: Endpoint, *, message_bytes_max: int = 1 << 30) -> None:
        if endpoint.p2p_ring.slot_bytes < HEADER_BYTES:
            raise ValueError(f"slot_bytes: {endpoint.p2p_ring.slot_bytes} must be at least {HEADER_BYTES}")
        self._endpoint = endpoint
        self._message_bytes_max = message_bytes_max
        self._outgoing: dict[Rank, Outgoing] = {}
        self._incoming: dict[Rank, Incoming] = {}

    def send(self, array: npt.NDArray[Any], peer: Rank, event_id: int, deadline: Deadline) -> None:
        """Send `array` and wait until `peer` has received it.

        Args:
            array: up to 8 dimensions, any plain number dtype, C-contiguous; read only, may be reused after
            return. peer: a rank that has a ring for this one (its `p2p_peers`). event_id: u64 tag that the
            receiver must ask for. deadline: absolute, monotonic.

        Raises:
            PeerDied: the receiver has ended, or its address is unknown. It may have received the message.
            PeerStalled: the deadline passed, or the receiver gave up half-way. The message may still
            arrive, whole
                or not at all.
            SegmentCorrupt: the grant or the ack is outside its bounds.
            ValueError: `array` or `event_id` breaks its rule; nothing was sent.

        Blocks: yes, waits on the peer; releases the GIL. Order: messages to one peer arrive in the order
        sent. Source: paper v6 section 2, steps 1-4 and 8. Twin: `bus.xccl.reference.P2pReference`.
        """
        if not 0 <= event_id <= EVENT_ID_MAX:
            raise ValueError(f"event_id: {event_id} is outside 0..{EVENT_ID_MAX}")
        check_array(array)
        link = self._open_outgoing(peer, event_id, deadline)
        data = array.reshape(-1).view(np.uint8).data
        header = MessageHeader.of(array).pack()
        num_sent = chunk_id = 0
        while chunk_id == 0 or num_sent < len(data):
            slot = link.claim(event_id, deadline)
            start = len(header) if chunk_id == 0 else 0
            slot[:start] = header[:start]
            num_bytes = min(len(slot) - start, len(data) - num_sent)
            _native.copy(slot, start, data, num_sent, num_bytes)
            link.push(start + num_bytes, event_id, chunk_id)
            num_sent += num_bytes
            chunk_id += 1
        link.await_ack(event_id, deadline)

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
            was consumed, except that a message which had arrived in part
                is lost; its sender is told.
            SegmentCorrupt: a record or a position is outside its bounds.
            ValueError: `out` has another dtype or shape (the message stays), or `peer` has no ring here.

        After an error `out` may be partly filled. Blocks: yes; releases the GIL.
        Source: paper v6 section 2, steps 5-7. Twin: `bus.xccl.reference.P2pReference`.
        """
        rank = str(self._endpoint.me)
        link = self._open_incoming(peer, event_id)
        while True:
            record = self._await_start(link, event_id, deadline)
            if record.event_id != event_id:
                text = f"the next message is event {record.event_id:#x}"
                raise EventMismatch(text, rank=rank, peer=str(peer), event_id=event_id)
            header = self._parse_header(record, peer)
            if out is not None:
                check_out(out, header, rank=rank, peer=str(peer), event_id=event_id)
            target = np.empty(header.shape, header.dtype) if out is None else out
            if self._drain(link, target, peer, event_id, deadline):
                link.acknowledge(event_id)
                return target

    def discard(self, peer: Rank, deadline: Deadline) -> int:
        """Drop the next message of `peer`, acknowledge it, and return its event id. Errors as for `recv`."""
        link = self._open_incoming(peer, 0)
        while True:
            record = self._await_start(link, 0, deadline)
            event_id = record.event_id
            scratch = np.empty(self._parse_header(record, peer).num_bytes, np.uint8)
            if self._drain(link, scratch, peer, event_id, deadline):
                link.acknowledge(event_id)
                return event_id

    def accept(self, peer: Rank) -> None:
        """Grant `peer` its ring without receiving, so that its `send` may begin. Errors as for `recv`."""
        self._open_incoming(peer, 0)

    def close(self) -> None:
        """Drop all links, so that the endpoint's mappings can go. Idempotent."""
        self._outgoing.clear()
        self._incoming.clear()

    def _open_outgoing(self, peer: Rank, event_id: int, deadline: Deadline) -> Outgoing:
        segment = self._endpoint.peer(peer, event_id)
        link = self._outgoing.get(peer)
        if link is None or link.segment is not segment:
            link = self._outgoing[peer] = Outgoing.open(self._endpoint, peer, segment, event_id, deadline)
        return link

    def _open_incoming(self, peer: Rank, event_id: int) -> Incoming:
        offset = self._endpoint.ring_offset(peer)
        if offset is None:
            raise ValueError(f"peer: {peer} has no ring at {self._endpoint.me}; name it in p2p_peers")
        segment = self._endpoint.peer(peer, event_id)
        link = self._incoming.get(peer)
        if link is None or link.segment is not segment:
            link = self._incoming[peer] = Incoming(self._endpoint, peer, segment, offset)
        return link

    def _await_start(self, link: Incoming, event_id: int, deadline: Deadline) -> Record:
        """Return the first record of the next message; skip what an abandoned message left."""
        while (record := link.await_record(event_id, deadline)).chunk_id != 0:
            link.release()
        return record

    def _drain(
        self, link: Incoming, target: npt.NDArray[Any], peer: Rank, event_id: int, deadline: Deadline
    ) -> bool:
        """Copy the message whose first record is next into `target`. False: its sender gave up half-way."""
        data = target.reshape(-1).view(np.uint8).data
        num_received = chunk_id = 0
        while chunk_id == 0 or num_received < len(data):
            record = link.await_record(event_id, deadline)
            if (record.event_id, record.chunk_id) != (event_id, chunk_id):
                return False
            start = HEADER_BYTES if chunk_id == 0 else 0
            num_bytes = len(record.payload) - start
            if not 0 <= num_bytes <= len(data) - num_received:
                raise self._corrupt(peer, f"chunk {chunk_id} has {num_bytes} bytes of {len(data)}", event_id)
            _native.copy(data, num_received, record.payload, start, num_bytes)
            link.release()
            num_received += num_bytes
            chunk_id += 1
        return True

    def _parse_header(self, record: Record, peer: Rank) -> MessageHeader:
        try:
            return MessageHeader.parse(bytes(record.payload[:HEADER_BYTES]), self._message_bytes_max)
        except ValueError as error:
            raise self._corrupt(peer, f"message header: {error}", record.event_id) from error

    def _corrupt(self, peer: Rank, text: str, event_id: int) -> SegmentCorrupt:
        return SegmentCorrupt(text, rank=str(self._endpoint.me), peer=str(peer), event_id=event_id)
