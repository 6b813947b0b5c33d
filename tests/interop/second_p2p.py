"""Point-to-point of the second implementation: both ends of a link, after bus/README.md.

An array is (dtype, shape, bytes); NumPy is not needed. The sender sends inline (one record or many), several
parts, and from its app area (pull); the receiver takes all of these, and what was put into its app area. What is read
in the sender's own memory is in second_reach.py.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from tests.interop.second import (
    COUNTER_BITS,
    Cell,
    EventMismatch,
    PeerStalled,
    Segment,
    SegmentCorrupt,
    round_up,
    stamp,
    wait_for,
)

DATA, ACK, GRANT = 0, 1, 2  # lanes
INLINE, PULL, PUT, READ = 1, 2, 3, 4
RECORD = struct.Struct("=QIIQ")
TAG = struct.Struct("=4sBBH4Q")
REST = struct.Struct("=8Q")
SLOTS_AT = 256
END_BITS = 48


@dataclass(frozen=True)
class Array:
    """An array: dtype as NumPy's `str`, shape, and its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes that dtype and shape announce."""
        return math.prod(self.shape) * int(self.dtype[2:])


@dataclass(frozen=True)
class Ring:
    """Where a ring lies in the receiver's segment, and its geometry."""

    segment: Segment
    offset: int
    num_slots: int
    slot_bytes: int

    def record_at(self, position: int) -> int:
        """Return the offset of the record of `position`."""
        stride = 64 + round_up(self.slot_bytes, 64)
        return self.offset + SLOTS_AT + position % self.num_slots * stride

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole ring."""
        return SLOTS_AT + self.num_slots * (64 + round_up(self.slot_bytes, 64))

    def check(self) -> Ring:
        """Return itself if it lies in the managed area. SegmentCorrupt."""
        areas = self.segment.areas
        low, high = areas.managed_offset, areas.managed_offset + areas.managed_bytes
        if self.num_slots < 1 or self.slot_bytes < 128 or not low <= self.offset <= high - self.total_bytes:
            raise SegmentCorrupt(f"ring {self.offset} {self.num_slots} {self.slot_bytes}")
        return self


@dataclass(frozen=True)
class Record:
    """A record and its payload, copied out of its slot."""

    chunk_id: int
    event_id: int
    tag: bytes
    payload: bytes


@dataclass
class Header:
    """The header of one part, from a record's tag; `skip` is the length of further dimensions in the
    payload."""

    dtype: str
    kind: int
    num_more: int
    shape: tuple[int, ...]
    skip: int


def pack_tag(array: Array, kind: int, num_more: int) -> tuple[bytes, bytes]:
    """Return (tag, first bytes of the payload) for one part."""
    dims = (*array.shape, *[0] * 12)
    tag = TAG.pack(array.dtype.encode(), len(array.shape), kind, num_more, *dims[:4])
    return tag, REST.pack(*dims[4:12]) if len(array.shape) > 4 else b""


def unpack_tag(record: Record) -> Header:
    """Read a part's header. SegmentCorrupt."""
    code, ndim, kind, num_more, *dims = TAG.unpack(record.tag)
    skip = 64 if ndim > 4 else 0
    if ndim > 8 or kind not in (INLINE, PULL, PUT, READ) or len(record.payload) < skip:
        raise SegmentCorrupt(f"tag: ndim {ndim} kind {kind}")
    if skip:
        dims += REST.unpack_from(record.payload)
    return Header(code.rstrip(b"\0").decode(), kind, num_more, tuple(dims[:ndim]), skip)


class _Counted:
    """A cell of a peer that this rank writes; begins where an earlier end of this incarnation stopped."""

    def __init__(self, own: Segment, peer: Segment, own_slot: int, lane: int) -> None:
        self._peer, self._incarnation = peer, own.incarnation
        self._offset = peer.cell_offset(own_slot, lane)
        cell = peer.read_cell(self._offset)
        self.last = cell if cell is not None and is_from(cell, own.incarnation) else Cell(0, 0, 0, 0)
        self._count = self.last.w0 % 2**COUNTER_BITS

    def write(self, w1: int, w2: int, w3: int) -> None:
        """Publish, then ring."""
        self._count += 1
        self._peer.write_cell(self._offset, stamp(self._incarnation, self._count), w1, w2, w3)
        self._peer.ring()


def is_from(cell: Cell, incarnation: int) -> bool:
    """Tell whether that incarnation wrote the cell."""
    return cell.w0 >> COUNTER_BITS == incarnation % 2**24


class Sender:
    """The end that sends. `own_slot` and `peer_slot` are places in the world."""

    def __init__(self, own: Segment, peer: Segment, own_slot: int, peer_slot: int, deadline_s: float) -> None:
        self._own, self._peer = own, peer
        self._ack = own.cell_offset(peer_slot, ACK)
        self._grant = own.cell_offset(peer_slot, GRANT)
        self._data = _Counted(own, peer, own_slot, DATA)
        self._tail = self._data.last.w3
        self._ring = wait_for(own, peer, self._look_for_grant, deadline_s, "no grant")

    def _look_for_grant(self) -> Ring | None:
        cell = self._own.read_cell(self._grant)
        if cell is None or cell.w1 != self._peer.incarnation:
            return None
        return Ring(self._peer, cell.w2, cell.w3 >> 32, cell.w3 % 2**32).check()

    def _acked(self) -> tuple[int, int]:
        """Return (head, tail at the end of the last message taken); a torn cell is read again."""
        while True:
            cell = self._own.read_cell(self._ack)
            if cell is None and self._own.u64[self._ack // 8] == 0 and self._is_fresh():
                return 0, 0
            if cell is not None:
                return (cell.w3, cell.w2 % 2**END_BITS) if is_from(cell, self._peer.incarnation) else (0, 0)

    def _is_fresh(self) -> bool:
        return not any(self._own.u64[self._ack // 8 + i] for i in range(1, 4))

    def send(self, arrays: list[Array], event_id: int, deadline_s: float) -> None:
        """Send one message of these parts and wait until it is taken."""
        chunk_id = 0
        for i, array in enumerate(arrays):
            tag, rest = pack_tag(array, INLINE, len(arrays) - 1 - i)
            body, at = rest + array.data, 0
            while at < len(body) or at == 0:
                piece = body[at : at + self._ring.slot_bytes]
                self._push(event_id, chunk_id, tag if at == 0 else bytes(40), piece, deadline_s)
                chunk_id, at = chunk_id + 1, at + max(1, len(piece))
        self._await_ack(deadline_s)

    def send_pulled(self, array: Array, app_offset: int, event_id: int, deadline_s: float) -> None:
        """Send an array that lies `app_offset` bytes into the own app area: only its place goes through the
        ring."""
        tag, rest = pack_tag(array, PULL, 0)
        place = struct.pack("=Q", self._own.areas.app_offset + app_offset)
        self._push(event_id, 0, tag, rest + place, deadline_s)
        self._await_ack(deadline_s)

    def _push(self, event_id: int, chunk_id: int, tag: bytes, payload: bytes, deadline_s: float) -> None:
        def look_for_room() -> bool | None:
            return self._tail - self._acked()[0] < self._ring.num_slots or None

        wait_for(self._own, self._peer, look_for_room, deadline_s, "ring full")
        at = self._ring.record_at(self._tail)
        self._peer.bytes[at + 64 : at + 64 + len(payload)] = payload
        RECORD.pack_into(self._peer.bytes, at, self._tail, len(payload), chunk_id, event_id)
        self._peer.bytes[at + RECORD.size : at + 64] = tag
        self._tail += 1
        self._data.write(event_id, chunk_id, self._tail)

    def _await_ack(self, deadline_s: float) -> None:
        def look_for_ack() -> bool | None:
            head, end = self._acked()
            if end == self._tail == head:
                return True
            if head >= self._tail:
                raise PeerStalled("it gave the message up")
            return None

        wait_for(self._own, self._peer, look_for_ack, deadline_s, "no ack")


class Receiver:
    """The end that receives; its ring lies `ring_offset` bytes into the own managed area."""

    def __init__(
        self,
        own: Segment,
        peer: Segment,
        own_slot: int,
        peer_slot: int,
        *,
        ring_offset: int,
        num_slots: int,
        slot_bytes: int,
    ) -> None:
        self._own, self._peer = own, peer
        self._ring = Ring(own, own.areas.managed_offset + ring_offset, num_slots, slot_bytes).check()
        self._data = own.cell_offset(peer_slot, DATA)
        self._ack = _Counted(own, peer, own_slot, ACK)
        self._head = self._published = self._ack.last.w3
        self._event, self._end = self._ack.last.w1, self._ack.last.w2 % 2**END_BITS
        self._drops = self._ack.last.w2 >> END_BITS
        grant = _Counted(own, peer, own_slot, GRANT)
        grant.write(own.incarnation, self._ring.offset, num_slots << 32 | slot_bytes)

    def recv(self, event_id: int, deadline_s: float) -> list[Array]:
        """Return the parts of the next message, which must carry `event_id`."""
        record = self._first_record(deadline_s)
        if record.event_id != event_id:
            raise EventMismatch(f"event {record.event_id}, not {event_id}")
        while True:
            arrays = self._take_message(record, deadline_s)
            if arrays is not None:
                break
            record = self._peek(deadline_s)
        self._event, self._end = event_id, self._head
        self._publish()
        return arrays

    def _first_record(self, deadline_s: float) -> Record:
        """Return the record that begins the next message; skip what a `send` that gave up has left."""
        while True:
            record = self._peek(deadline_s)
            if record.chunk_id == 0:
                return record
            self._drops = (self._drops + 1) % 2**16
            self._release()

    def _take_message(self, record: Record, deadline_s: float) -> list[Array] | None:
        """Take the message that begins with `record`; None when another one begins before its end."""
        arrays: list[Array] = []
        chunk_id = 0
        while True:
            header = unpack_tag(record)
            array = Array(header.dtype, header.shape, b"")
            body = bytearray(record.payload[header.skip :])
            if header.kind != INLINE:
                body = self._far_bytes(header.kind, body, array.num_bytes)
            chunk_id = self._step(chunk_id)
            while len(body) < array.num_bytes:
                record = self._peek(deadline_s)
                if record.chunk_id != chunk_id:
                    self._drops = (self._drops + 1) % 2**16
                    return None
                body += record.payload
                chunk_id = self._step(chunk_id)
            if len(body) != array.num_bytes:
                raise SegmentCorrupt(f"{len(body)} bytes for {array.num_bytes}")
            arrays.append(Array(header.dtype, header.shape, bytes(body)))
            if header.num_more == 0:
                return arrays
            record = self._peek(deadline_s)
            if record.chunk_id != chunk_id:
                self._drops = (self._drops + 1) % 2**16
                return None

    def _step(self, chunk_id: int) -> int:
        self._release()
        return chunk_id + 1

    def _far_bytes(self, kind: int, pointer: bytearray, num_bytes: int) -> bytearray:
        if kind == READ:
            raise SegmentCorrupt("to be read, without a proof that this end can")
        segment = self._peer if kind == PULL else self._own
        (offset,) = struct.unpack("=Q", pointer)
        low, high = segment.areas.app_offset, segment.areas.app_offset + segment.areas.app_bytes
        if not low <= offset <= high - num_bytes:
            raise SegmentCorrupt(f"offset {offset} + {num_bytes} is outside the app area")
        return bytearray(segment.bytes[offset : offset + num_bytes])

    def _peek(self, deadline_s: float) -> Record:
        # NOTE: here, not after a release: head at the message's tail without its end says "given up".
        if self._head - self._published >= max(1, self._ring.num_slots // 2):
            self._publish()
        wait_for(self._own, self._peer, self._look_for_record, deadline_s, "no record")
        at = self._ring.record_at(self._head)
        position, num_bytes, chunk_id, event_id = RECORD.unpack_from(self._own.bytes, at)
        if position != self._head or num_bytes > self._ring.slot_bytes:
            raise SegmentCorrupt(f"record {position} of {num_bytes} bytes at {self._head}")
        tag = bytes(self._own.bytes[at + RECORD.size : at + 64])
        return Record(chunk_id, event_id, tag, bytes(self._own.bytes[at + 64 : at + 64 + num_bytes]))

    def _look_for_record(self) -> bool | None:
        cell = self._own.read_cell(self._data)
        if cell is None or not is_from(cell, self._peer.incarnation):
            return None
        if not 0 <= cell.w3 - self._published <= self._ring.num_slots:
            raise SegmentCorrupt(f"tail {cell.w3} at head {self._published}")
        return cell.w3 > self._head or None

    def _release(self) -> None:
        self._head += 1

    def _publish(self) -> None:
        self._published = self._head
        self._ack.write(self._event, self._drops << END_BITS | self._end, self._head)
