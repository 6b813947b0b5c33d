"""Links: one direction between one incarnation of this rank and one incarnation of a peer.

The ring from sender S to receiver R lies in R's managed area; three cells steer it, each written by the far
side and polled locally:

    cell               lies in  w0     w1                w2                      w3
    grant (R writes)   S        stamp  R's incarnation   offset of the ring      num_slots << 32 | slot_bytes
    data  (S writes)   R        stamp  event_id          chunk_id                tail
    ack   (R writes)   S        stamp  event_id taken    end of that message     head

R grants when it first turns to an incarnation of S; S pushes nothing before. Both start at position 0.
After a death nothing is repaired: the new incarnation of S has a new segment without a grant, and gets one
when R has mapped it; the new incarnation of R grants its own ring. Cells of an older incarnation are
recognised by their stamp. No byte is ever written by two incarnations at once: the new one holds the owner
lock only because the old one has ended.
"""

from __future__ import annotations

from bus.clock import Deadline
from bus.errors import SegmentCorrupt
from bus.memory import _native
from bus.memory.ring import Consumer, Producer, Record, RingLayout
from bus.memory.segment import Segment
from bus.xccl.endpoint import (
    P2P_ACK_LANE,
    P2P_DATA_LANE,
    P2P_GRANT_LANE,
    Endpoint,
    Rank,
    stamp,
    stamped_by,
)
from bus.xccl.message import HEADER_BYTES

U32 = 0xFFFFFFFF


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
            _, self.w1, self.w2, self._last = cell
        return self._last

    def store(self, value: int) -> None:
        """Publish the position with `w1` and `w2` (release)."""
        self._num_writes += 1
        word = stamp(self._incarnation, self._num_writes)
        _native.write_cell(self._buf, self._offset, word, self.w1, self.w2, value)  # SYNC: cell-whole
        self._last = value


def _corrupt(endpoint: Endpoint, peer: Rank, text: str, event_id: int = 0) -> SegmentCorrupt:
    return SegmentCorrupt(text, rank=str(endpoint.me), peer=str(peer), event_id=event_id)


class Outgoing:
    """The sender's end. `open` waits for the grant; then `claim`, fill, `push`, ..., `await_ack`."""

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

    @classmethod
    def open(
        cls, endpoint: Endpoint, peer: Rank, segment: Segment, event_id: int, deadline: Deadline
    ) -> Outgoing:
        """Wait for the peer's grant and return the link. Raises PeerDied, PeerStalled, SegmentCorrupt."""
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
        if not area.managed_offset <= offset <= last or slot_bytes < HEADER_BYTES or offset % 8:
            raise _corrupt(endpoint, peer, f"grant: ring at {offset} with slots of {slot_bytes}", event_id)
        return cls(endpoint, peer, segment, offset, layout)

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

    def push(self, num_bytes: int, event_id: int, chunk_id: int) -> None:
        """Publish the claimed slot and ring the receiver."""
        self._data.w1, self._data.w2 = event_id, chunk_id
        self._producer.commit(num_bytes, event_id=event_id, chunk_id=chunk_id)
        self.segment.ring_doorbell()

    def await_ack(self, event_id: int, deadline: Deadline) -> None:
        """Wait until the receiver has taken everything up to the tail as a message."""
        endpoint, tail = self._endpoint, self._producer.tail

        def probe() -> bool | None:
            head = self._ack.load()
            if head > tail or self._ack.w2 > tail:
                raise _corrupt(endpoint, self._peer, f"ack: head {head} is beyond tail {tail}", event_id)
            return self._ack.w2 == tail if head == tail else None

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
        data = CellPosition(endpoint.segment, data_offset, segment.incarnation)
        self._ack = CellPosition(segment, endpoint.cell_at(segment, P2P_ACK_LANE), endpoint.incarnation)
        region = memoryview(endpoint.segment.buf)[offset : offset + layout.total_bytes]
        self._consumer = Consumer(
            region, layout, tail=data, head=self._ack, rank=str(endpoint.me), peer=str(peer)
        )
        self._num_unpublished = 0
        self._grant(offset, layout)

    def _grant(self, offset: int, layout: RingLayout) -> None:
        segment, incarnation = self.segment, self._endpoint.incarnation
        cell = self._endpoint.cell_at(segment, P2P_GRANT_LANE)
        geometry = layout.num_slots << 32 | layout.slot_bytes
        # SYNC: cell-whole
        _native.write_cell(segment.buf, cell, stamp(incarnation, 1), incarnation, offset, geometry)
        segment.ring_doorbell()

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
        self._ack.w1, self._ack.w2 = event_id, self._consumer.head
        self._num_unpublished = 1
        self._publish()

    def _publish(self) -> None:
        if self._num_unpublished:
            self._ack.store(self._consumer.head)
            self.segment.ring_doorbell()
            self._num_unpublished = 0
