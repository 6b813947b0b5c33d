"""One source as one sink sees it: the isolated instance of a prefill-decode pair.

Fetches of a pair are worked on one after the other, in the order in which they were posted. What goes wrong with one
ends that one, and touches no other pair. Nothing here waits for the source: blocks are pulled from its segment, and
two looks at the offer's cell, before and after, tell whether they were what was offered. So a source that has died
can still be fetched from, as long as its segment is mapped or its name is there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TypeVar

from bus.control.messages import KvTicket
from bus.distflow.table import (
    ENDED,
    MAGIC,
    SERIAL_MAX,
    TRAILER_BYTES,
    TransferLayout,
    digest_of,
    parse_trailer,
)
from bus.errors import OfferEnded, PeerDied, SegmentCorrupt, XcclError
from bus.memory import _native
from bus.memory.segment import Segment

Error = TypeVar("Error", bound=XcclError)


@dataclass(frozen=True, slots=True)
class SinkIdentity:
    """Who fetches: the sink's number at every source, its incarnation, and its name in errors."""

    index: int
    incarnation: int
    rank: str


@dataclass(slots=True)
class Fetch:
    """One receive under way. `runs` are what is still to be copied: (source offset, own offset, bytes)."""

    fetch_id: int
    ticket: KvTicket
    num_blocks: int
    runs: deque[tuple[int, int, int]]
    payload_bytes: int


class KvPair:
    """A mapped source, and the fetches from it. One thread. Never blocks.

    Args:
        ticket: any of the source's.
        service: what the source must be.
        block_bytes: of one block, on both sides.

    Raises:
        PeerDied: the segment is gone.
        SegmentCorrupt: it is not the segment that the ticket names, or its table is impossible.
    """

    def __init__(self, ticket: KvTicket, sink: SinkIdentity, *, service: str, block_bytes: int) -> None:
        self.fetches: deque[Fetch] = deque()
        self._sink = sink
        self._peer = f"{service}-{ticket.index}.{ticket.incarnation}"
        try:
            self._segment = Segment.attach(ticket.segment)
        except (FileNotFoundError, ValueError) as error:
            raise self._error(PeerDied, f"its segment is gone ({error})", ticket) from error
        try:
            self._base = self._segment.layout.app_offset
            self.layout = self._checked_layout(ticket, service, block_bytes)
        except BaseException:
            self._segment.close()
            raise

    def owner_alive(self) -> bool:
        """Tell whether the source runs (one system call)."""
        return self._segment.owner_alive()

    def close(self) -> None:
        """Drop the mapping."""
        self._segment.close()

    def admit(self, ticket: KvTicket) -> int:
        """Check a ticket against the table; return the bytes of its payload.

        Raises:
            OfferEnded: the offer does not stand.
            SegmentCorrupt: ticket and table contradict each other, or name what is not there.
        """
        layout, ids = self.layout, ticket.block_ids
        if ticket.segment != self._segment.name or not 0 <= ticket.slot < layout.num_slots:
            text = f"ticket: slot {ticket.slot} of {ticket.segment} does not exist"
            raise self._error(SegmentCorrupt, text, ticket)
        if not ids or min(ids) < 0 or max(ids) >= layout.num_blocks:
            text = f"ticket: block ids must be in 0..{layout.num_blocks - 1}"
            raise self._error(SegmentCorrupt, text, ticket)
        _, sizes, payload_bytes, digest = self.look(ticket)
        if sizes != len(ids) << 32 | ticket.num_tokens or digest != digest_of(ids):
            raise self._error(SegmentCorrupt, f"slot {ticket.slot} has other blocks than the ticket", ticket)
        if payload_bytes > layout.payload_bytes_max:
            raise self._error(SegmentCorrupt, f"slot {ticket.slot}: payload of {payload_bytes} bytes", ticket)
        return payload_bytes

    def look(self, ticket: KvTicket) -> tuple[int, int, int, int]:
        """Return the offer's cell. Called after the last copy, it proves that all bytes were what was offered.

        Serials are never used again, so the offer stood all the time between two looks that find it.

        Raises:
            OfferEnded: the offer does not stand.
        """
        offset = self._base + self.layout.offer_offset(ticket.slot)
        # Loads of the blocks before this call stay before the fence in `read_cell` and its second look at w0.
        cell = _native.read_cell(self._segment.buf, offset)  # SYNC: kv-offer
        if cell is None or cell[0] != ticket.serial or not 1 <= ticket.serial <= SERIAL_MAX:
            raise self._error(OfferEnded, f"slot {ticket.slot} {_describe(cell)}", ticket)
        return cell

    def copy(self, fetch: Fetch, out: memoryview, bytes_max: int) -> int:
        """Copy up to `bytes_max` bytes of what is left into `out`; return how many."""
        copied = 0
        while fetch.runs and copied < bytes_max:
            source, own, left = fetch.runs.popleft()
            num_bytes = min(left, bytes_max - copied)
            _native.copy(out, own, self._segment.buf, self._base + source, num_bytes)
            copied += num_bytes
            if num_bytes < left:
                fetch.runs.appendleft((source + num_bytes, own + num_bytes, left - num_bytes))
        return copied

    def read_payload(self, fetch: Fetch) -> bytes:
        """Return a copy of the payload; worth something once `look` has passed again."""
        start = self._base + self.layout.payload_offset(fetch.ticket.slot)
        return self._segment.buf[start : start + fetch.payload_bytes]

    def answer(self, fetch: Fetch, count: int) -> None:
        """Tell the source that the fetch is over and well. `count` rises from answer to answer of this sink."""
        layout, buf, ticket = self.layout, self._segment.buf, fetch.ticket
        stamp = (self._sink.incarnation & 0xFFFFFF) << 40 | count & 0xFF_FFFF_FFFF
        offset = self._base + layout.done_offset(self._sink.index, ticket.slot)
        num_bytes = fetch.num_blocks * layout.block_bytes
        _native.write_cell(buf, offset, stamp, ticket.serial, fetch.num_blocks, num_bytes)  # SYNC: kv-done
        news = self._base + layout.news_offset(self._sink.index)
        _native.store_u64(buf, news, stamp)  # SYNC: kv-news

    def _checked_layout(self, ticket: KvTicket, service: str, block_bytes: int) -> TransferLayout:
        identity, area = self._segment.identity, self._segment.layout
        if (identity.service, identity.index, identity.incarnation) != (
            service,
            ticket.index,
            ticket.incarnation,
        ):
            raise self._error(SegmentCorrupt, f"segment {ticket.segment} belongs to {identity}", ticket)
        start = area.app_offset + area.app_bytes - TRAILER_BYTES
        if area.app_bytes < TRAILER_BYTES or start % 8:
            raise self._error(SegmentCorrupt, f"an app area of {area.app_bytes} bytes has no table", ticket)
        magic = _native.load_u64(self._segment.buf, start)  # SYNC: kv-table
        if magic != MAGIC:
            raise self._error(SegmentCorrupt, f"transfer table: magic {magic:#x} must be {MAGIC:#x}", ticket)
        try:
            layout = parse_trailer(self._segment.buf[start : start + TRAILER_BYTES], area.app_bytes)
        except ValueError as error:
            raise self._error(SegmentCorrupt, str(error), ticket) from error
        if layout.block_bytes != block_bytes:
            text = f"its blocks have {layout.block_bytes} bytes, ours {block_bytes}"
            raise self._error(SegmentCorrupt, text, ticket)
        if self._sink.index >= layout.num_sinks:
            text = f"its table has {layout.num_sinks} sinks, this is sink {self._sink.index}"
            raise self._error(SegmentCorrupt, text, ticket)
        return layout

    def _error(self, kind: type[Error], text: str, ticket: KvTicket) -> Error:
        return kind(text, rank=self._sink.rank, peer=self._peer, event_id=ticket.serial)


def _describe(cell: tuple[int, int, int, int] | None) -> str:
    if cell is None:
        return "has no offer, or is being written"
    verb = "ended" if cell[0] & ENDED else "holds"
    return f"{verb} serial {cell[0] & ~ENDED}"
