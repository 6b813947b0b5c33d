"""Every shared byte of a segment, named and drawn. Words are native-endian; a segment never leaves its host.

    offset 0        4096                      managed_offset        app_offset            total_bytes
    |               |                         |                     |                     |
    +---------------+-------------------------+---------------------+---------------------+
    | header, 1 page| metadata: cells, 64 B   | managed area: rings | app area: activations|
    |               | apart, 32 B used        | and blocks          | and the like        |
    +---------------+-------------------------+---------------------+---------------------+

Header (a group of words that is written often has a pair of cache lines of its own: CPUs fetch lines in
pairs):

      0        8            12           16          32      36          40
      +--------+------------+------------+-----------+-------+-----------+--------------+
      | magic  | version u32| header u32 | service   | index | num_lanes | incarnation  |   identity
      +--------+------------+------------+-----------+-------+-----------+--------------+
     64        72           80               88              96           104         112
      +--------+------------+----------------+---------------+------------+-----------+-------------+
      | cells  | num_cells  | managed_offset | managed_bytes | app_offset | app_bytes | total_bytes |  u64
      +--------+------------+----------------+---------------+------------+-----------+-------------+
    128 doorbell: seq, sleepers, patient, wake_at, alarm: u32    256 heartbeat u64, ns; places u32    384 ready u32

Cell of (peer, lane) = metadata + (peer * num_lanes + lane) * 64:

      0              8              16             24             32          64
      +--------------+--------------+--------------+--------------+-----------+
      | w0: sequence | w1           | w2           | w3           | unused    |
      +--------------+--------------+--------------+--------------+-----------+

Memory order. "owner" is the process that created the segment; "peer p" is the one process of a slot.

| word              | writer               | readers   | order                                               |
|-------------------|----------------------|-----------|-----------------------------------------------------|
| identity, areas   | owner, once          | all       | plain, published by `ready`                         |
| ready             | owner, once          | all       | release / acquire, SYNC: word                       |
| doorbell seq      | all (atomic add)     | owner     | seq_cst add / acquire, SYNC: word, SYNC: doorbell   |
| doorbell sleepers | waiters (atomic add) | all       | seq_cst, SYNC: doorbell; a ringer never writes it   |
| doorbell patient  | owner                | ringers   | seq_cst; 1 = a waiter needs several rings           |
| doorbell wake_at  | owner                | ringers   | seq_cst; seq from which a patient waiter is woken   |
| doorbell alarm    | owner                | owner     | seq_cst add / acquire; deaths told by the kernel    |
| heartbeat         | owner                | all       | release / acquire, SYNC: word                       |
| place             | owner                | its group | relaxed; 1 + the core where it polls, a hint        |
| cell w0 of peer p | peer p               | owner     | release / acquire, SYNC: cell-whole                 |
| cell w1..w3       | peer p               | owner     | relaxed between the fences of SYNC: cell-torn       |
| ring slot bytes   | its sender           | owner     | plain, published by the ring's tail                 |
| app area          | as the user agrees   | as agreed | plain, published by a cell or a ring                |

The owner lock is no word: it is an open-file-description lock on the segment's file, which the kernel frees
when the owner ends, however it ends.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

PAGE_BYTES: Final = 4096
LINE_BYTES: Final = 64
LINE_PAIR_BYTES: Final = 128

MAGIC: Final = int.from_bytes(b"XDSSEG\r\n", "little")
LAYOUT_VERSION: Final = 1
READY: Final = 1

HEADER_BYTES: Final = PAGE_BYTES
IDENTITY_OFFSET: Final = 0
AREAS_OFFSET: Final = IDENTITY_OFFSET + LINE_BYTES
DOORBELL_OFFSET: Final = AREAS_OFFSET + LINE_BYTES
ALARM_OFFSET: Final = DOORBELL_OFFSET + 16
HEARTBEAT_OFFSET: Final = DOORBELL_OFFSET + LINE_PAIR_BYTES
LINK_PLACE_OFFSET: Final = HEARTBEAT_OFFSET + 12
READY_OFFSET: Final = HEARTBEAT_OFFSET + LINE_PAIR_BYTES
HEADER_USED_BYTES: Final = READY_OFFSET + LINE_PAIR_BYTES

SERVICE_BYTES: Final = 16
IDENTITY: Final = struct.Struct(
    "=QII16sIIQ"
)  # magic, version, header bytes, service, index, num_lanes, incarnation
AREAS: Final = struct.Struct("=7Q")

CELLS_OFFSET: Final = HEADER_BYTES
CELL_STRIDE_BYTES: Final = LINE_BYTES
CELL_USED_BYTES: Final = 32

NUM_CELLS_MAX: Final = 1 << 20
AREA_BYTES_MAX: Final = 1 << 40

if IDENTITY.size > LINE_BYTES or AREAS.size > LINE_BYTES:
    raise AssertionError("a header line overflows its 64 bytes")
if HEADER_USED_BYTES > HEADER_BYTES or CELL_USED_BYTES > CELL_STRIDE_BYTES:
    raise AssertionError("the header or a cell overflows its place")
if any(offset % LINE_BYTES for offset in (AREAS_OFFSET, DOORBELL_OFFSET, HEARTBEAT_OFFSET, READY_OFFSET)):
    raise AssertionError("a header group does not start on a cache line")


def align_up(num_bytes: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is >= `num_bytes`."""
    return -(-num_bytes // unit) * unit


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is outside {low}..{high}")


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """Offsets and sizes of a segment, computed from three numbers.

    Args:
        num_cells: metadata cells, a multiple of `num_lanes`; peer p has the lanes p * num_lanes onward.
        managed_bytes: size of the managed area.
        app_bytes: size of the app area.
        num_lanes: cells per peer.

    Raises:
        ValueError: a number is negative, too large, or `num_cells` is no multiple of `num_lanes`.
    """

    num_cells: int
    managed_bytes: int
    app_bytes: int
    num_lanes: int = 1
    cells_offset: int = field(init=False)
    managed_offset: int = field(init=False)
    app_offset: int = field(init=False)
    total_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        _check_range("num_cells", self.num_cells, 0, NUM_CELLS_MAX)
        _check_range("num_lanes", self.num_lanes, 1, NUM_CELLS_MAX)
        _check_range("managed_bytes", self.managed_bytes, 0, AREA_BYTES_MAX)
        _check_range("app_bytes", self.app_bytes, 0, AREA_BYTES_MAX)
        if self.num_cells % self.num_lanes:
            raise ValueError(f"num_cells: {self.num_cells} is no multiple of num_lanes {self.num_lanes}")
        managed_offset = align_up(CELLS_OFFSET + self.num_cells * CELL_STRIDE_BYTES, PAGE_BYTES)
        app_offset = align_up(managed_offset + self.managed_bytes, PAGE_BYTES)
        object.__setattr__(self, "cells_offset", CELLS_OFFSET)
        object.__setattr__(self, "managed_offset", managed_offset)
        object.__setattr__(self, "app_offset", app_offset)
        object.__setattr__(self, "total_bytes", align_up(app_offset + self.app_bytes, PAGE_BYTES))

    @property
    def num_peers(self) -> int:
        """Peer slots that have cells."""
        return self.num_cells // self.num_lanes

    def cell_offset(self, peer: int, lane: int = 0) -> int:
        """Return the byte offset of the cell that `peer` writes on `lane`; IndexError outside the area."""
        if not (0 <= peer < self.num_peers and 0 <= lane < self.num_lanes):
            raise IndexError(
                f"cell (peer {peer}, lane {lane}) is outside {self.num_peers} peers x {self.num_lanes} lanes"
            )
        return self.cells_offset + (peer * self.num_lanes + lane) * CELL_STRIDE_BYTES

    def pack_areas(self) -> bytes:
        """Return the header line that describes the areas."""
        return AREAS.pack(
            self.cells_offset,
            self.num_cells,
            self.managed_offset,
            self.managed_bytes,
            self.app_offset,
            self.app_bytes,
            self.total_bytes,
        )


@dataclass(frozen=True, slots=True)
class SegmentIdentity:
    """Who owns a segment."""

    service: str
    index: int
    incarnation: int

    def __post_init__(self) -> None:
        encoded = self.service.encode("ascii", "replace")
        if not self.service.isascii() or not 1 <= len(encoded) <= SERVICE_BYTES:
            raise ValueError(f"service: {self.service!r} must be 1..{SERVICE_BYTES} ASCII characters")
        _check_range("index", self.index, 0, 2**32 - 1)
        _check_range("incarnation", self.incarnation, 1, 2**64 - 1)

    def __str__(self) -> str:
        return f"{self.service}-{self.index}.{self.incarnation}"


def pack_identity(identity: SegmentIdentity, layout: SegmentLayout) -> bytes:
    """Return the first header line."""
    return IDENTITY.pack(
        MAGIC,
        LAYOUT_VERSION,
        HEADER_BYTES,
        identity.service.encode("ascii"),
        identity.index,
        layout.num_lanes,
        identity.incarnation,
    )


def parse_header(header: bytes) -> tuple[SegmentIdentity, SegmentLayout]:
    """Return what the first two header lines say; ValueError names the first field that is wrong."""
    if len(header) < AREAS_OFFSET + AREAS.size:
        raise ValueError(f"header: {len(header)} bytes are too few")
    magic, version, header_bytes, service, index, num_lanes, incarnation = IDENTITY.unpack_from(
        header, IDENTITY_OFFSET
    )
    if magic != MAGIC:
        raise ValueError(f"magic: {magic:#x} must be {MAGIC:#x}")
    if version != LAYOUT_VERSION:
        raise ValueError(f"layout version: {version} must be {LAYOUT_VERSION}")
    if header_bytes != HEADER_BYTES:
        raise ValueError(f"header bytes: {header_bytes} must be {HEADER_BYTES}")
    areas = AREAS.unpack_from(header, AREAS_OFFSET)
    layout = SegmentLayout(areas[1], areas[3], areas[5], num_lanes)
    if layout.pack_areas() != AREAS.pack(*areas):
        raise ValueError(f"areas: {areas} do not follow from their sizes")
    identity = SegmentIdentity(service.rstrip(b"\0").decode("ascii", "replace"), index, incarnation)
    return identity, layout
