"""A single-producer, single-consumer ring of fixed slots in shared memory.

Positions count slots and only grow; the slot of position p is p mod num_slots. The producer owns `tail`
(one past the last committed slot), the consumer owns `head` (the next slot to read): 0 <= tail - head <=
num_slots, always.

    claim: the slot at `tail` belongs to the producer, nobody else sees it
    commit: the record's header is written, then tail + 1 is published          SYNC: ring-data
    peek: the consumer sees tail > head and reads the slot in place
    release: head + 1 is published, the slot may be claimed again               SYNC: ring-free

A producer that dies between claim and commit leaves nothing visible. A full ring is backpressure
(`try_claim` gives None), not an error. Each side keeps the other's position and reads the shared word again
only when it seems full or empty. Where the two positions live is the caller's choice (`Position`): by
default as words in front of the slots, in point-to-point transport as metadata cells of two segments, so
that each side polls its own memory.

      0          128        256                       256 + slot_stride
      +----------+----------+--------+----------------+--------+--------------
      | tail u64 | head u64 | record | payload        | record | ...
      +----------+----------+--------+----------------+--------+--------------

    record, 64 bytes: position u64, num_bytes u32, chunk_id u32, event_id u64, 40 bytes for the user (`tag`)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol

from bus.errors import SegmentCorrupt
from bus.memory import _native
from bus.memory.layout import LINE_BYTES, LINE_PAIR_BYTES, align_up

RECORD: Final = struct.Struct("=QIIQ40s")
RECORD_BYTES: Final = LINE_BYTES
TAG_BYTES: Final = 40
TAIL_OFFSET: Final = 0
HEAD_OFFSET: Final = TAIL_OFFSET + LINE_PAIR_BYTES
SLOTS_OFFSET: Final = HEAD_OFFSET + LINE_PAIR_BYTES
NUM_SLOTS_MAX: Final = 1 << 20
SLOT_BYTES_MAX: Final = 1 << 30

if RECORD.size != RECORD_BYTES:
    raise AssertionError("a ring record does not fill its line")


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Geometry of a ring: `num_slots` slots whose payload holds `slot_bytes` each."""

    num_slots: int
    slot_bytes: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_slots <= NUM_SLOTS_MAX:
            raise ValueError(f"num_slots: {self.num_slots} is outside 1..{NUM_SLOTS_MAX}")
        if not 1 <= self.slot_bytes <= SLOT_BYTES_MAX:
            raise ValueError(f"slot_bytes: {self.slot_bytes} is outside 1..{SLOT_BYTES_MAX}")

    @property
    def slot_stride(self) -> int:
        """Bytes from one record to the next."""
        return RECORD_BYTES + align_up(self.slot_bytes, LINE_BYTES)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole region, both position words included."""
        return SLOTS_OFFSET + self.num_slots * self.slot_stride


class Position(Protocol):
    """Where one of the two positions lives."""

    def load(self) -> int:
        """Return the position (acquire)."""

    def store(self, value: int) -> None:
        """Publish the position (release)."""


@dataclass(frozen=True, slots=True)
class WordPosition:
    """A position in a u64 of its own."""

    buf: memoryview
    offset: int

    def load(self) -> int:
        """Return the position (acquire)."""
        return _native.load_u64(self.buf, self.offset)  # SYNC: ring-data, SYNC: ring-free

    def store(self, value: int) -> None:
        """Publish the position (release)."""
        _native.store_u64(self.buf, self.offset, value)  # SYNC: ring-data, SYNC: ring-free


@dataclass(frozen=True, slots=True)
class Record:
    """What `peek` found. `payload` is the slot itself: valid until `release`."""

    event_id: int
    chunk_id: int
    payload: memoryview
    tag: bytes


class _Side:
    """What both ends share: the region, the positions, and how to complain."""

    def __init__(
        self,
        region: memoryview,
        layout: RingLayout,
        *,
        tail: Position | None = None,
        head: Position | None = None,
        rank: str = "-",
        peer: str = "-",
    ) -> None:
        if len(region) < layout.total_bytes:
            raise ValueError(f"region: {len(region)} bytes are fewer than the ring's {layout.total_bytes}")
        self.layout = layout
        self._region = region
        self._tail = tail or WordPosition(region, TAIL_OFFSET)
        self._head = head or WordPosition(region, HEAD_OFFSET)
        self._rank = rank
        self._peer = peer

    def _record_offset(self, position: int) -> int:
        return SLOTS_OFFSET + (position % self.layout.num_slots) * self.layout.slot_stride

    def _payload(self, position: int, num_bytes: int) -> memoryview:
        start = self._record_offset(position) + RECORD_BYTES
        return self._region[start : start + num_bytes]

    def _check(self, head: int, tail: int) -> None:
        if not 0 <= tail - head <= self.layout.num_slots:
            self._fail(f"tail {tail} and head {head} do not fit {self.layout.num_slots} slots")

    def _fail(self, text: str) -> NoReturn:
        raise SegmentCorrupt(f"ring: {text}", rank=self._rank, peer=self._peer)


class Producer(_Side):
    """The writing end. One thread.

    Args:
        region: at least `layout.total_bytes`, writable, 8-byte aligned.
        layout: the geometry, the same at both ends.
        tail, head: where the positions live; by default in the region.
        rank, peer: names for errors.

    Raises:
        SegmentCorrupt: (here and in `try_claim`) the positions contradict each other.
    """

    def __init__(
        self,
        region: memoryview,
        layout: RingLayout,
        *,
        tail: Position | None = None,
        head: Position | None = None,
        rank: str = "-",
        peer: str = "-",
    ) -> None:
        super().__init__(region, layout, tail=tail, head=head, rank=rank, peer=peer)
        self.tail = self._tail.load()
        self._head_seen = self._head.load()
        self._claimed = False
        self._check(self._head_seen, self.tail)

    def try_claim(self) -> memoryview | None:
        """Return the next slot's payload (`slot_bytes` long) to be filled; None while the ring is full.

        Exactly one `commit` or `abort` must follow. RuntimeError if a slot is claimed already.
        """
        if self._claimed:
            raise RuntimeError("ring: the claimed slot was neither committed nor aborted")
        if self.tail - self._head_seen == self.layout.num_slots:
            head = self._head.load()
            if head < self._head_seen:
                self._fail(f"head fell from {self._head_seen} to {head}")
            self._check(head, self.tail)
            self._head_seen = head
            if self.tail - head == self.layout.num_slots:
                return None
        self._claimed = True
        return self._payload(self.tail, self.layout.slot_bytes)

    def commit(self, num_bytes: int, *, event_id: int = 0, chunk_id: int = 0, tag: bytes = b"") -> None:
        """Publish the first `num_bytes` of the claimed slot. ValueError if slot or tag hold fewer."""
        self._require_claim()
        if len(tag) > TAG_BYTES:
            raise ValueError(f"tag: {len(tag)} bytes are more than {TAG_BYTES}")
        if not 0 <= num_bytes <= self.layout.slot_bytes:
            raise ValueError(f"num_bytes: {num_bytes} is outside 0..{self.layout.slot_bytes}")
        RECORD.pack_into(
            self._region, self._record_offset(self.tail), self.tail, num_bytes, chunk_id, event_id, tag
        )
        self._tail.store(self.tail + 1)
        self.tail += 1
        self._claimed = False

    def abort(self) -> None:
        """Give the claimed slot back; the consumer never sees it."""
        self._require_claim()
        self._claimed = False

    def _require_claim(self) -> None:
        if not self._claimed:
            raise RuntimeError("ring: no slot is claimed")


class Consumer(_Side):
    """The reading end. One thread. Arguments and errors as for `Producer`."""

    def __init__(
        self,
        region: memoryview,
        layout: RingLayout,
        *,
        tail: Position | None = None,
        head: Position | None = None,
        rank: str = "-",
        peer: str = "-",
    ) -> None:
        super().__init__(region, layout, tail=tail, head=head, rank=rank, peer=peer)
        self.head = self._head.load()
        self._tail_seen = self._tail.load()
        self._check(self.head, self._tail_seen)

    def peek(self) -> Record | None:
        """Return the oldest committed record without consuming it; None while the ring is empty.

        Raises:
            SegmentCorrupt: a position or the record's header is outside its bounds; nothing was consumed.
        """
        if self._tail_seen == self.head:
            tail = self._tail.load()
            self._check(self.head, tail)
            self._tail_seen = tail
            if tail == self.head:
                return None
        position, num_bytes, chunk_id, event_id, tag = RECORD.unpack_from(
            self._region, self._record_offset(self.head)
        )
        if position != self.head:
            self._fail(f"the slot of position {self.head} says {position}")
        if num_bytes > self.layout.slot_bytes:
            self._fail(f"record of {num_bytes} bytes in a slot of {self.layout.slot_bytes}")
        return Record(event_id, chunk_id, self._payload(self.head, num_bytes), tag)

    def release(self, *, publish: bool = True) -> None:
        """Consume the oldest record; its slot may be overwritten at once.

        With `publish=False` the producer learns of it only with the next published release.
        RuntimeError if there is no record.
        """
        if self._tail_seen == self.head:
            raise RuntimeError("ring: there is no record to release")
        self.head += 1
        if publish:
            self._head.store(self.head)
