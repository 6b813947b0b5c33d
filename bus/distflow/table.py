"""The transfer table: where a source says which of its blocks are offered, and its sinks say what they have taken.

It lies in the source's app area, behind the KV blocks; a trailer in the last 64 bytes of the area describes it:

    0           table_offset      rows_offset                        payloads_offset        trailer_offset   app_bytes
    +-----------+-----------------+----------------------------------+----------------------+----------------+
    | KV blocks | an offer cell   | per sink: news u64 (128 B), then | per slot: payload,   | trailer, 64 B  |
    |           | per slot, 64 B  | a done cell per slot, 32 B each  | a multiple of 64 B   |                |
    +-----------+-----------------+----------------------------------+----------------------+----------------+

    offer cell:  w0 serial while the offer stands, serial | ENDED afterwards | w1 blocks << 32 | tokens
                 w2 bytes of the payload                                     | w3 digest of the block ids
    done cell:   w0 stamp, as in point-to-point cells | w1 serial | w2 blocks taken | w3 bytes taken

Every cell has one writer: the source those of the offers, sink d those of its row. So a source and each of its sinks
are an instance of their own, and nothing that goes wrong between two of them is seen by others. bus/README.md, "KV
transfer", is normative.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from bus.memory.layout import LINE_BYTES, LINE_PAIR_BYTES, align_up

MAGIC: Final = int.from_bytes(b"XDSKVT\r\n", "little")
TABLE_VERSION: Final = 1
TRAILER: Final = struct.Struct(
    "=QIIIIQQ"
)  # magic, version, slots, sinks, blocks, block_bytes, payload_bytes_max
TRAILER_BYTES: Final = LINE_BYTES
OFFER_STRIDE_BYTES: Final = LINE_BYTES
DONE_BYTES: Final = 32

SERIAL_MAX: Final = (1 << 63) - 1
ENDED: Final = 1 << 63  # in w0: the offer with this serial was fetched or withdrawn
NUM_SLOTS_MAX: Final = 1 << 20
NUM_SINKS_MAX: Final = 1 << 12
NUM_BLOCKS_MAX: Final = (1 << 32) - 1
BYTES_MAX: Final = 1 << 40


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is outside {low}..{high}")


@dataclass(frozen=True, slots=True)
class TransferLayout:
    """Geometry of a source's app area. All offsets are from its start.

    Args:
        num_blocks: KV blocks, which begin the app area.
        block_bytes: of one block, all layers; a multiple of 4.
        num_slots: offers that may stand at once.
        num_sinks: sinks there are; each writes the row of its index.
        payload_bytes_max: opaque bytes that may go with an offer (KV of a draft model, hidden state).

    Raises:
        ValueError: a number is outside its range.
    """

    num_blocks: int
    block_bytes: int
    num_slots: int
    num_sinks: int
    payload_bytes_max: int = 0

    def __post_init__(self) -> None:
        _check("num_blocks", self.num_blocks, 1, NUM_BLOCKS_MAX)
        _check("block_bytes", self.block_bytes, 4, BYTES_MAX)
        _check("num_slots", self.num_slots, 1, NUM_SLOTS_MAX)
        _check("num_sinks", self.num_sinks, 1, NUM_SINKS_MAX)
        _check("payload_bytes_max", self.payload_bytes_max, 0, BYTES_MAX)
        if self.block_bytes % 4:
            raise ValueError(f"block_bytes: {self.block_bytes} must be a multiple of 4")
        _check("app_bytes", self.app_bytes, 0, BYTES_MAX)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.num_blocks * self.block_bytes

    @property
    def table_offset(self) -> int:
        """Where the offer cells begin."""
        return align_up(self.kv_bytes, LINE_PAIR_BYTES)

    @property
    def rows_offset(self) -> int:
        """Where the sinks' rows begin."""
        return align_up(self.table_offset + self.num_slots * OFFER_STRIDE_BYTES, LINE_PAIR_BYTES)

    @property
    def row_stride(self) -> int:
        """Bytes of a sink's row."""
        return LINE_PAIR_BYTES + align_up(self.num_slots * DONE_BYTES, LINE_PAIR_BYTES)

    @property
    def payloads_offset(self) -> int:
        """Where the payloads begin."""
        return self.rows_offset + self.num_sinks * self.row_stride

    @property
    def payload_stride(self) -> int:
        """Bytes from one payload to the next."""
        return align_up(self.payload_bytes_max, LINE_BYTES)

    @property
    def trailer_offset(self) -> int:
        """Where the trailer is: the last 64 bytes of the app area."""
        return self.payloads_offset + self.num_slots * self.payload_stride

    @property
    def app_bytes(self) -> int:
        """Bytes of the whole app area, blocks included."""
        return self.trailer_offset + TRAILER_BYTES

    def offer_offset(self, slot: int) -> int:
        """Return the offset of a slot's offer cell."""
        return self.table_offset + slot * OFFER_STRIDE_BYTES

    def news_offset(self, sink: int) -> int:
        """Return the offset of the word that changes with every done cell of a sink."""
        return self.rows_offset + sink * self.row_stride

    def done_offset(self, sink: int, slot: int) -> int:
        """Return the offset of a sink's done cell of a slot."""
        return self.news_offset(sink) + LINE_PAIR_BYTES + slot * DONE_BYTES

    def payload_offset(self, slot: int) -> int:
        """Return the offset of a slot's payload."""
        return self.payloads_offset + slot * self.payload_stride

    def pack_trailer(self) -> bytes:
        """Return the trailer's used bytes."""
        return TRAILER.pack(
            MAGIC,
            TABLE_VERSION,
            self.num_slots,
            self.num_sinks,
            self.num_blocks,
            self.block_bytes,
            self.payload_bytes_max,
        )


def parse_trailer(trailer: bytes, app_bytes: int) -> TransferLayout:
    """Return the layout that a trailer describes; ValueError names the first thing that is wrong."""
    magic, version, num_slots, num_sinks, num_blocks, block_bytes, payload = TRAILER.unpack_from(trailer)
    if magic != MAGIC:
        raise ValueError(f"transfer table: magic {magic:#x} must be {MAGIC:#x}")
    if version != TABLE_VERSION:
        raise ValueError(f"transfer table: version {version} must be {TABLE_VERSION}")
    layout = TransferLayout(num_blocks, block_bytes, num_slots, num_sinks, payload)
    if layout.app_bytes != app_bytes:
        raise ValueError(
            f"transfer table: its sizes make {layout.app_bytes} bytes, the app area has {app_bytes}"
        )
    return layout


def digest_of(block_ids: Sequence[int]) -> int:
    """Return 64 bits that tell lists of block ids, each in 0..2^32-1, from one another."""
    ids = np.asarray(block_ids, np.dtype("<u4")).tobytes()
    return int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little")
