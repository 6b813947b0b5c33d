"""Links: one direction between one incarnation of this rank and one incarnation of a peer. The slow form.

The ring from sender S to receiver R lies in R's managed area; three cells steer it, each written by the far
side and polled locally:

    cell               lies in  w0     w1                w2                      w3
    grant (R writes)   S        stamp  R's incarnation   offset of the ring      num_slots << 32 | slot_bytes
    data  (S writes)   R        stamp  event_id          chunk_id                tail
    ack   (R writes)   S        stamp  event_id taken    drops << 48 | end       head

"end" is the tail at the end of the last message taken, "drops" counts (mod 2^16) what was skipped because a
side gave a message up half-way. R grants when it first turns to an incarnation of S; S pushes nothing before.
Both start at position 0. After a death nothing is repaired: the new incarnation of S has a new segment without
a grant, and gets one when R has mapped it; the new incarnation of R grants its own ring. Cells of an older
incarnation are recognised by their stamp. No byte is ever written by two incarnations at once: the new one
holds the owner lock only because the old one has ended.

`Outgoing` and `Incoming` do in Python, step by step, what the ends of bus/xccl/channel.py do in C; both forms
write the same bytes, and either may face the other. This one is the twin of tests, and serves strategies that
have no C form.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.clock import Deadline
from bus.errors import EventMismatch, SegmentCorrupt
from bus.memory import _native
from bus.memory.layout import CELL_USED_BYTES
from bus.memory.ring import Consumer, Producer, Record, RingLayout
from bus.memory.segment import Segment
from bus.xccl.endpoint import (
    COUNTER_BITS,
    P2P_ACK_LANE,
    P2P_DATA_LANE,
    P2P_GRANT_LANE,
    Endpoint,
    Rank,
    stamp,
    stamped_by,
)
from bus.xccl.message import (
    EXTENSION_BYTES,
    INLINE,
    OFFER,
    OFFER_STATE,
    OFFERED,
    POINTER,
    PULL,
    READ,
    SHARED_OFFER_BYTES,
    SLOT_BYTES_MIN,
    TAG_DIMS,
    TAKEN,
    WITHDRAWN,
    MessageHeader,
    check_array,
    check_out,
)

U32 = 0xFFFFFFFF
END_BITS = 48
END_MASK = (1 << END_BITS) - 1
GONE_TRIES = 1000  # a millisecond apart


class CellPosition:
    """A ring position in w3 of a cell: stored into a peer's segment, or loaded from the own one.

    `load` returns the last whole value that `incarnation` wrote, 0 before its first; `w1` and `w2` go with
    it.
    """

    def __init__(self, segment: Segment, offset: int, incarnation: int) -> None:
        self._buf = segment.buf
        self._offset = offset
        self._incarnation = incarnation
        self._num_writes = 0
        self._last = 0
        self.w1 = 0
        self.w2 = 0

    def load(self) -> int:
        """Return the position (acquire)."""
        cell = _native.read_cell(self._buf, self._offset)  # SYNC: cell-whole
        if cell is not None and stamped_by(cell[0], self._incarnation):
            word, self.w1, self.w2, self._last = cell
            self._num_writes = word & ((1 << COUNTER_BITS) - 1)
        return self._last

    def store(self, value: int) -> None:
        """Publish the position with `w1` and `w2` (release)."""
        self._num_writes += 1
        word = stamp(self._incarnation, self._num_writes)
        _native.write_cell(self._buf, self._offset, word, self.w1, self.w2, value)  # SYNC: cell-whole
        self._last = value


def _corrupt(endpoint: Endpoint, peer: Rank, text: str, event_id: int = 0) -> SegmentCorrupt:
    return SegmentCorrupt(text, rank=str(endpoint.me), peer=str(peer), event_id=event_id)


def await_grant(
    endpoint: Endpoint, peer: Rank, segment: Segment, event_id: int, deadline: Deadline
) -> tuple[int, RingLayout]:
    """Wait for the peer's grant; return offset and geometry of the ring in its segment.

    Raises PeerDied, PeerStalled, SegmentCorrupt.
    """
    own = endpoint.segment
    grant_offset = endpoint.cell_from(peer, P2P_GRANT_LANE)

    def probe() -> tuple[int, int] | None:
        cell = _native.read_cell(own.buf, grant_offset)  # SYNC: cell-whole
        return (cell[2], cell[3]) if cell is not None and cell[1] == segment.incarnation else None

    grant = endpoint.wait(probe, peers=[(peer, segment)], event_id=event_id, deadline=deadline)
    if grant is None:
        raise endpoint.stalled(peer, event_id, "it has not granted a ring, it never turned to this rank")
    offset, geometry = grant
    num_slots, slot_bytes = geometry >> 32, geometry & U32
    try:
        layout = RingLayout(num_slots, slot_bytes)
    except ValueError as error:
        raise _corrupt(endpoint, peer, f"grant: {error}", event_id) from error
    area = segment.layout
    last = area.managed_offset + area.managed_bytes - layout.total_bytes
    if not area.managed_offset <= offset <= last or slot_bytes < SLOT_BYTES_MIN or offset % 8:
        raise _corrupt(endpoint, peer, f"grant: ring at {offset} with slots of {slot_bytes}", event_id)
    return offset, layout


def write_grant(endpoint: Endpoint, segment: Segment, offset: int) -> None:
    """Tell the sender that owns `segment` where its ring lies in the own segment, and ring it."""
    cell, layout = endpoint.cell_at(segment, P2P_GRANT_LANE), endpoint.p2p_ring
    geometry = layout.num_slots << 32 | layout.slot_bytes
    word = stamp(endpoint.incarnation, 1)
    # SYNC: cell-whole
    _native.write_cell(segment.buf, cell, word, endpoint.incarnation, offset, geometry)
    segment.ring_doorbell()


class Outgoing:
    """The sender's end, made from a grant: `claim`, fill, `push`, ..., `await_ack`; `send` does it all."""

    def __init__(
        self, endpoint: Endpoint, peer: Rank, segment: Segment, offset: int, layout: RingLayout
    ) -> None:
        self._endpoint = endpoint
        self._peer = peer
        self.segment = segment
        self._data = CellPosition(segment, endpoint.cell_at(segment, P2P_DATA_LANE), endpoint.incarnation)
        ack_offset = endpoint.cell_from(peer, P2P_ACK_LANE)
        self._ack = CellPosition(endpoint.segment, ack_offset, segment.incarnation)
        region = memoryview(segment.buf)[offset : offset + layout.total_bytes]
        self._producer = Producer(
            region, layout, tail=self._data, head=self._ack, rank=str(endpoint.me), peer=str(peer)
        )

    def claim(self, event_id: int, deadline: Deadline) -> memoryview:
        """Return the next free slot; waits while the ring is full."""
        slot = self._producer.try_claim()
        if slot is None:
            slot = self._endpoint.wait(
                self._producer.try_claim,
                peers=[(self._peer, self.segment)],
                event_id=event_id,
                deadline=deadline,
            )
        if slot is None:
            raise self._endpoint.stalled(self._peer, event_id, "its ring stayed full")
        return slot

    def send(self, array: npt.NDArray[Any], event_id: int, deadline: Deadline) -> None:
        """See `P2p.send`."""
        check_array(array)
        data = array.reshape(-1).view(np.uint8).data
        tag, prefix = MessageHeader.of(array).pack()
        num_sent = chunk_id = 0
        while chunk_id == 0 or num_sent < len(data):
            slot = self.claim(event_id, deadline)
            start = len(prefix) if chunk_id == 0 else 0
            slot[:start] = prefix[:start]
            num_bytes = min(len(slot) - start, len(data) - num_sent)
            _native.copy(slot, start, data, num_sent, num_bytes)
            self.push(start + num_bytes, event_id, chunk_id, tag if chunk_id == 0 else b"")
            num_sent += num_bytes
            chunk_id += 1
        self.await_ack(event_id, deadline)

    def push(self, num_bytes: int, event_id: int, chunk_id: int, tag: bytes = b"") -> None:
        """Publish the claimed slot and ring the receiver."""
        self._data.w1, self._data.w2 = event_id, chunk_id
        self._producer.commit(num_bytes, event_id=event_id, chunk_id=chunk_id, tag=tag)
        self.segment.ring_doorbell()

    def await_ack(self, event_id: int, deadline: Deadline) -> None:
        """Wait until the receiver has taken everything up to the tail as a message."""
        endpoint, tail = self._endpoint, self._producer.tail

        def probe() -> bool | None:
            head, end = self._ack.load(), self._ack.w2 & END_MASK
            if head > tail or end > tail:
                raise _corrupt(endpoint, self._peer, f"ack: head {head} is beyond tail {tail}", event_id)
            return end == tail if head == tail else None

        taken = endpoint.wait(probe, peers=[(self._peer, self.segment)], event_id=event_id, deadline=deadline)
        if taken is None:
            raise endpoint.stalled(self._peer, event_id, "it has not acknowledged")
        if not taken:
            raise endpoint.stalled(self._peer, event_id, "it gave the message up half-way")


class Incoming:
    """The receiver's end. Making it grants the ring; then `await_record`, `release`, ..., `acknowledge`."""

    def __init__(self, endpoint: Endpoint, peer: Rank, segment: Segment, offset: int) -> None:
        layout = endpoint.p2p_ring
        self._endpoint = endpoint
        self._peer = peer
        self.segment = segment
        data_offset = endpoint.cell_from(peer, P2P_DATA_LANE)
        self._offer_offset = data_offset + CELL_USED_BYTES
        data = CellPosition(endpoint.segment, data_offset, segment.incarnation)
        self._ack = CellPosition(segment, endpoint.cell_at(segment, P2P_ACK_LANE), endpoint.incarnation)
        region = memoryview(endpoint.segment.buf)[offset : offset + layout.total_bytes]
        self._consumer = Consumer(
            region, layout, tail=data, head=self._ack, rank=str(endpoint.me), peer=str(peer)
        )
        self._num_unpublished = 0
        write_grant(endpoint, segment, offset)

    def recv(
        self, out: npt.NDArray[Any] | None, event_id: int, deadline: Deadline, message_bytes_max: int
    ) -> npt.NDArray[Any]:
        """See `P2p.recv`. Takes messages of one part only."""
        while True:
            record = self._await_start(event_id, deadline)
            if record.event_id != event_id:
                text = f"the next message is event {record.event_id:#x}"
                rank, peer = str(self._endpoint.me), str(self._peer)
                raise EventMismatch(text, rank=rank, peer=peer, event_id=event_id)
            header = self._parse(record, message_bytes_max)
            if header.num_more:
                raise ValueError(f"message: it has {header.num_more + 1} parts, receive them with recv_parts")
            if out is not None:
                rank, peer = str(self._endpoint.me), str(self._peer)
                check_out(out, header, rank=rank, peer=peer, event_id=event_id)
            target = np.empty(header.shape, header.dtype) if out is None else out
            if self._drain(header, target, event_id, deadline):
                self.acknowledge(event_id)
                return target

    def _await_start(self, event_id: int, deadline: Deadline) -> Record:
        """Return the first record of the next message; skip what an abandoned message left."""
        while (record := self.await_record(event_id, deadline)).chunk_id != 0:
            self._drop()
            self.release()
        return record

    def _drain(
        self, header: MessageHeader, target: npt.NDArray[Any], event_id: int, deadline: Deadline
    ) -> bool:
        """Copy the message whose first record is next into `target`. False: its sender gave up half-way."""
        data = target.reshape(-1).view(np.uint8).data
        num_received = chunk_id = 0
        while chunk_id == 0 or num_received < len(data):
            record = self.await_record(event_id, deadline)
            if (record.event_id, record.chunk_id) != (event_id, chunk_id):
                self._drop()
                return False
            start = EXTENSION_BYTES if chunk_id == 0 and len(header.shape) > TAG_DIMS else 0
            if header.kind == READ:
                is_taken = self._read(record, start, data)
                if not is_taken:
                    self._drop()
                self.release()
                return is_taken
            source, at, num_bytes = self._content(header, record, start, len(data))
            if not 0 <= num_bytes <= len(data) - num_received:
                text = f"chunk {chunk_id} has {num_bytes} bytes of {len(data)}"
                raise _corrupt(self._endpoint, self._peer, text, event_id)
            _native.copy(data, num_received, source, at, num_bytes)
            self.release()
            num_received += num_bytes
            chunk_id += 1
        return True

    def _content(
        self, header: MessageHeader, record: Record, start: int, num_bytes: int
    ) -> tuple[Any, int, int]:
        """Return where the bytes of a record lie: a buffer, an offset in it, and their number."""
        if header.kind == INLINE:
            return record.payload, start, len(record.payload) - start
        segment = self.segment if header.kind == PULL else self._endpoint.segment
        low, high = segment.layout.app_offset, segment.layout.app_offset + segment.layout.app_bytes
        size = len(record.payload) - start
        is_pointer = size == POINTER.size or (header.kind == PULL and size == SHARED_OFFER_BYTES)
        at = POINTER.unpack_from(record.payload, start)[0] if is_pointer else -1
        if not low <= at <= high - num_bytes:
            text = f"pointer: {num_bytes} bytes at {at} are outside the app area {low}..{high}"
            raise _corrupt(self._endpoint, self._peer, text, record.event_id)
        return segment.buf, at, num_bytes

    def _read(self, record: Record, start: int, data: memoryview) -> bool:
        """Copy `data` out of the sender's memory. False: the sender has withdrawn it."""
        endpoint, event_id = self._endpoint, record.event_id
        offer = _native.read_cell(endpoint.segment.buf, self._offer_offset)  # SYNC: cell-whole
        size = len(record.payload) - start
        if size not in (OFFER.size, SHARED_OFFER_BYTES) or offer is None:
            raise _corrupt(endpoint, self._peer, "offer: there is none, or it has another size", event_id)
        address, _ = OFFER.unpack_from(record.payload, start)
        error: OSError | ValueError | None = None
        try:
            _native.read_memory(offer[1], address, data)
        except (OSError, ValueError) as failure:
            error = failure
        at = start + OFFER_STATE
        if _native.load_u32(record.payload, at) == WITHDRAWN:  # SYNC: read-state
            return False
        endpoint.check_alive(self._peer, self.segment, event_id)  # it was its memory, not that of a successor
        for _ in range(GONE_TRIES if isinstance(error, ProcessLookupError) else 0):
            time.sleep(0.001)  # a process that ends loses its memory a moment before its lock
            endpoint.check_alive(self._peer, self.segment, event_id)
        if error is not None:
            text = f"{len(data)} bytes of the sender's memory: {error}"
            raise _corrupt(endpoint, self._peer, text, event_id) from error
        return _native.cas_u32(record.payload, at, OFFERED, TAKEN)  # SYNC: read-state

    def _parse(self, record: Record, message_bytes_max: int) -> MessageHeader:
        try:
            return MessageHeader.parse(record.tag, bytes(record.payload[:EXTENSION_BYTES]), message_bytes_max)
        except ValueError as error:
            text = f"message header: {error}"
            raise _corrupt(self._endpoint, self._peer, text, record.event_id) from error

    def _drop(self) -> None:
        self._ack.w2 = (self._ack.w2 + (1 << END_BITS)) & 0xFFFFFFFFFFFFFFFF

    def await_record(self, event_id: int, deadline: Deadline) -> Record:
        """Return the oldest record, in place; waits while there is none. Publishes `head` each half ring."""
        record = self._consumer.peek()
        if record is None or self._num_unpublished >= max(1, self._consumer.layout.num_slots // 2):
            self._publish()
        if record is None:
            record = self._endpoint.wait(
                self._consumer.peek, peers=[(self._peer, self.segment)], event_id=event_id, deadline=deadline
            )
        if record is None:
            raise self._endpoint.stalled(self._peer, event_id, "nothing arrived")
        return record

    def release(self) -> None:
        """Consume the oldest record; the sender learns of it later.

        NOTE: the head is never published right after a message's last record, only together with the
        acknowledgement: a head at the tail without one tells the sender that its message was dropped.
        """
        self._consumer.release(publish=False)
        self._num_unpublished += 1

    def acknowledge(self, event_id: int) -> None:
        """Tell the sender that the message which ends at the head was taken."""
        self._ack.w1 = event_id
        self._ack.w2 = self._ack.w2 & ~END_MASK | self._consumer.head
        self._num_unpublished = 1
        self._publish()

    def _publish(self) -> None:
        if self._num_unpublished:
            self._ack.store(self._consumer.head)
            self.segment.ring_doorbell()
            self._num_unpublished = 0
