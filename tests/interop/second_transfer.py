"""A second implementation of KV transfer, after bus/README.md, "KV transfer". Nothing of `bus` is imported."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from tests.interop import second
from tests.interop.second import Areas, BusError, Segment, SegmentCorrupt, round_up, stamp

TRAILER = struct.Struct("=QIIIIQQ")
MAGIC = int.from_bytes(b"XDSKVT\r\n", "little")
OVER = 1 << 63


class Withdrawn(BusError):
    """The offer does not stand."""


class Ticket(NamedTuple):
    """What travels on the control plane."""

    slot: int
    serial: int
    num_tokens: int
    block_ids: tuple[int, ...]


def digest(block_ids: tuple[int, ...]) -> int:
    """Return the digest of block ids."""
    packed = b"".join(struct.pack("<I", block) for block in block_ids)
    return int(struct.unpack("<Q", blake2b(packed, digest_size=8).digest())[0])


@dataclass
class Sizes:
    """What the trailer says, and where everything is, from the start of the app area."""

    slots: int
    sinks: int
    blocks: int
    block_bytes: int
    payload_max: int
    offers: int = field(init=False)
    rows: int = field(init=False)
    row_bytes: int = field(init=False)
    payloads: int = field(init=False)
    trailer: int = field(init=False)

    def __post_init__(self) -> None:
        self.offers = round_up(self.blocks * self.block_bytes, 128)
        self.rows = round_up(self.offers + 64 * self.slots, 128)
        self.row_bytes = round_up(128 + 32 * self.slots, 128)
        self.payloads = self.rows + self.sinks * self.row_bytes
        self.trailer = self.payloads + self.slots * round_up(self.payload_max, 64)


class Table:
    """The app area of a source, as either side sees it."""

    def __init__(self, segment: Segment, sizes: Sizes) -> None:
        self.segment, self.sizes = segment, sizes
        self.app = segment.areas.app_offset

    def block(self, block_id: int) -> memoryview:
        """Return a block in place."""
        start = self.app + block_id * self.sizes.block_bytes
        return self.segment.bytes[start : start + self.sizes.block_bytes]

    def payload(self, slot: int, num_bytes: int) -> memoryview:
        """Return a slot's payload in place."""
        start = self.app + self.sizes.payloads + slot * round_up(self.sizes.payload_max, 64)
        return self.segment.bytes[start : start + num_bytes]

    def offer_cell(self, slot: int) -> int:
        """Return where it is."""
        return self.app + self.sizes.offers + 64 * slot

    def news(self, sink: int) -> int:
        """Return where it is."""
        return self.app + self.sizes.rows + sink * self.sizes.row_bytes

    def done_cell(self, sink: int, slot: int) -> int:
        """Return where it is."""
        return self.news(sink) + 128 + 32 * slot


class Source(Table):
    """Offers blocks of a segment of its own."""

    def __init__(self, name: str, sizes: Sizes, *, index: int, incarnation: int) -> None:
        areas = Areas.of(0, 0, sizes.trailer + 64)
        own = Segment.create(
            name, areas, service="prefill", index=index, incarnation=incarnation, num_lanes=1
        )
        super().__init__(own, sizes)
        at = self.app + sizes.trailer
        numbers = (sizes.slots, sizes.sinks, sizes.blocks, sizes.block_bytes, sizes.payload_max)
        own.bytes[at + 8 : at + TRAILER.size] = TRAILER.pack(0, 1, *numbers)[8:]
        own.u64[at // 8] = MAGIC
        self.standing: dict[int, Ticket] = {}
        self.next_serial = 1

    def offer(self, slot: int, block_ids: tuple[int, ...], num_tokens: int, payload: bytes = b"") -> Ticket:
        """Publish an offer in a free slot."""
        ticket = Ticket(slot, self.next_serial, num_tokens, block_ids)
        self.payload(slot, len(payload))[:] = payload
        words = (len(block_ids) << 32 | num_tokens, len(payload), digest(block_ids))
        self.segment.write_cell(self.offer_cell(slot), ticket.serial, *words)
        self.standing[ticket.serial] = ticket
        self.next_serial += 1
        return ticket

    def end(self, ticket: Ticket) -> None:
        """Take the offer back, fetched or not."""
        self.segment.write_cell(self.offer_cell(ticket.slot), OVER | ticket.serial, 0, 0, 0)
        del self.standing[ticket.serial]

    def fetched(self, sink: int) -> dict[int, int]:
        """End what the sink has fetched; return the number of blocks by serial."""
        found = {}
        for ticket in tuple(self.standing.values()):
            cell = self.segment.read_cell(self.done_cell(sink, ticket.slot))
            if cell is not None and cell.w1 == ticket.serial:
                if cell.w2 > len(ticket.block_ids) or cell.w3 != cell.w2 * self.sizes.block_bytes:
                    raise SegmentCorrupt(f"{cell}")
                found[ticket.serial] = cell.w2
                self.end(ticket)
        return found


class Sink:
    """Pulls from one source."""

    def __init__(self, name: str, *, index: int, incarnation: int) -> None:
        self.index, self.incarnation, self.count = index, incarnation, 0
        segment = Segment.attach(name)
        at = segment.areas.app_offset + segment.areas.app_bytes - 64
        if segment.u64[at // 8] != MAGIC:
            raise SegmentCorrupt("no table")
        _, version, *numbers = TRAILER.unpack_from(segment.bytes, at)
        sizes = Sizes(*numbers)
        if version != 1 or sizes.trailer + 64 != segment.areas.app_bytes:
            raise SegmentCorrupt(f"{numbers}")
        self.table = Table(segment, sizes)

    def look(self, ticket: Ticket) -> second.Cell:
        """Return the offer's cell while it stands."""
        cell = self.table.segment.read_cell(self.table.offer_cell(ticket.slot))
        if cell is None or cell.w0 != ticket.serial:
            raise Withdrawn(f"{cell}")
        return cell

    def fetch(self, ticket: Ticket, first_block: int = 0) -> tuple[list[bytes], bytes]:
        """Return the blocks from `first_block` on, and the payload."""
        cell = self.look(ticket)
        if cell.w1 != len(ticket.block_ids) << 32 | ticket.num_tokens or cell.w3 != digest(ticket.block_ids):
            raise SegmentCorrupt(f"{cell}")
        blocks = [bytes(self.table.block(block)) for block in ticket.block_ids[first_block:]]
        payload = bytes(self.table.payload(ticket.slot, cell.w2))
        self.look(ticket)
        self.count += 1
        w0 = stamp(self.incarnation, self.count)
        where = self.table.done_cell(self.index, ticket.slot)
        num_bytes = len(blocks) * self.table.sizes.block_bytes
        self.table.segment.write_cell(where, w0, ticket.serial, len(blocks), num_bytes)
        self.table.segment.u64[self.table.news(self.index) // 8] = w0
        return blocks, payload
