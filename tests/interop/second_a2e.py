"""A2E / E2A of the second implementation: both direct ends, float32, after bus/README.md.

One exchange at a time, on microbatch 0 of any number; a row is the bytes of `hidden` float32.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass

from tests.interop.second import (
    COUNTER_BITS,
    Areas,
    Cell,
    Segment,
    SegmentCorrupt,
    round_up,
    stamp,
    wait_for,
)

LINE = 64


@dataclass(frozen=True)
class Shape:
    """What all ranks have agreed on; no trampolines, one DP domain."""

    num_attention: int
    num_experts: int
    rows_max: int
    num_slots: int
    hidden: int
    num_microbatches: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return 4 * self.hidden

    @property
    def pairs_max(self) -> int:
        """Largest number of pairs."""
        return self.rows_max * self.num_slots

    @property
    def starts_at(self) -> int:
        """Offset of `starts` in a source block; x_scale is empty."""
        return round_up(self.rows_max * self.row_bytes, LINE)

    @property
    def pair_row_at(self) -> int:
        """Offset of `pair_row` in a source block."""
        return self.starts_at + round_up(4 * (self.num_experts + 1), LINE)

    @property
    def pair_expert_at(self) -> int:
        """Offset of `pair_expert` in a source block."""
        return self.pair_row_at + round_up(4 * self.pairs_max, LINE)

    @property
    def source_bytes(self) -> int:
        """Bytes of a source block."""
        return self.pair_expert_at + round_up(4 * self.pairs_max, LINE)

    @property
    def result_bytes(self) -> int:
        """Bytes of a result block."""
        return round_up(self.pairs_max * self.row_bytes, LINE)

    def attention_areas(self) -> Areas:
        """Return the areas of an attention rank's segment."""
        count = self.num_microbatches
        return Areas.of((self.num_experts + 1) * count, count * self.source_bytes, 0)

    def expert_areas(self) -> Areas:
        """Return the areas of an expert rank's segment."""
        blocks = self.num_attention * self.num_microbatches
        return Areas.of(2 * blocks, blocks * self.result_bytes, 0)


@dataclass(frozen=True)
class Pair:
    """A (row, slot) with an expert."""

    row: int
    slot: int
    rank: int
    expert: int


class Attention:
    """The attention rank's direct end."""

    def __init__(self, own: Segment, experts: list[Segment], shape: Shape, rank: int) -> None:
        self._own, self._experts, self._shape, self._rank = own, experts, shape, rank
        self._counts = [0] * len(experts)

    def exchange(
        self, rows: list[bytes], pairs: list[Pair], event: int, deadline_s: float
    ) -> dict[tuple[int, int], bytes]:
        """Send rows to the ranks of their pairs and return each pair's result by (row, slot)."""
        microbatch = event >> 16 & 0xF
        pairs = sorted(pairs, key=lambda pair: (pair.rank, pair.row, pair.slot))
        starts = [sum(pair.rank < r for pair in pairs) for r in range(len(self._experts) + 1)]
        self._stage(rows, pairs, starts, microbatch)
        stamps = {}
        for r, peer in enumerate(self._experts):
            if starts[r + 1] > starts[r]:
                stamps[r] = self._tell(r, peer, microbatch, event, starts, len(rows))
        found: dict[tuple[int, int], bytes] = {}
        for r, word in stamps.items():
            share = pairs[starts[r] : starts[r + 1]]
            found |= self._collect(r, microbatch, event, word, share, deadline_s)
        return found

    def _stage(self, rows: list[bytes], pairs: list[Pair], starts: list[int], microbatch: int) -> None:
        shape, view = self._shape, self._own.bytes
        base = self._own.areas.managed_offset + microbatch * shape.source_bytes
        x = b"".join(rows)
        view[base : base + len(x)] = x
        struct.pack_into(f"={len(starts)}i", view, base + shape.starts_at, *starts)
        count = f"={len(pairs)}i"
        struct.pack_into(count, view, base + shape.pair_row_at, *(pair.row for pair in pairs))
        struct.pack_into(count, view, base + shape.pair_expert_at, *(pair.expert for pair in pairs))

    def _tell(
        self, r: int, peer: Segment, microbatch: int, event: int, starts: list[int], num_rows: int
    ) -> int:
        self._counts[r] += 1
        word = stamp(self._own.incarnation, self._counts[r])
        cell = peer.cell_offset(self._rank * self._shape.num_microbatches + microbatch, 0)
        peer.write_cell(cell, word, event, starts[r] << 32 | starts[r + 1] - starts[r], num_rows)
        peer.ring()
        return word

    def _collect(
        self, r: int, microbatch: int, event: int, word: int, share: list[Pair], deadline_s: float
    ) -> dict[tuple[int, int], bytes]:
        shape, peer = self._shape, self._experts[r]
        offset = self._own.cell_offset(r * shape.num_microbatches + microbatch, 0)

        def look() -> Cell | None:
            cell = self._own.read_cell(offset)
            return cell if cell is not None and (cell.w1, cell.w3) == (event, word) else None

        cell = wait_for(self._own, peer, look, deadline_s, f"no answer of expert rank {r}")
        if cell.w2 != len(share):
            raise SegmentCorrupt(f"{cell.w2} results for {len(share)} pairs")
        block = self._rank * shape.num_microbatches + microbatch
        base = peer.areas.managed_offset + block * shape.result_bytes
        size = shape.row_bytes
        return {
            (pair.row, pair.slot): bytes(peer.bytes[base + k * size : base + (k + 1) * size])
            for k, pair in enumerate(share)
        }


class Expert:
    """The expert rank's direct end: its experts multiply a row by their id plus one."""

    def __init__(self, own: Segment, attention: list[Segment], shape: Shape, rank: int) -> None:
        self._own, self._attention, self._shape, self._rank = own, attention, shape, rank
        self._seen: dict[int, int] = {}
        self._count = 0

    def serve(self, count: int, deadline_s: float) -> None:
        """Answer `count` requests."""
        for _ in range(count):
            index, cell = wait_for(self._own, self._attention[0], self._look, deadline_s, "no request")
            self._answer(index, cell)

    def _look(self) -> tuple[int, Cell] | None:
        for index in range(self._shape.num_attention * self._shape.num_microbatches):
            cell = self._own.read_cell(self._own.cell_offset(index, 0))
            if cell is not None and self._seen.get(index) != cell.w0:
                self._seen[index] = cell.w0
                peer = self._attention[index // self._shape.num_microbatches]
                if cell.w0 >> COUNTER_BITS == peer.incarnation % 2**24:
                    return index, cell
        return None

    def _answer(self, index: int, cell: Cell) -> None:
        shape = self._shape
        peer, microbatch = self._attention[index // shape.num_microbatches], index % shape.num_microbatches
        first, count = cell.w2 >> 32, cell.w2 % 2**32
        if first + count > shape.pairs_max or cell.w3 > shape.rows_max or cell.w1 >> 16 & 0xF != microbatch:
            raise SegmentCorrupt(f"pairs {first} + {count}, rows {cell.w3}, event {cell.w1:#x}")
        base = peer.areas.managed_offset + microbatch * shape.source_bytes
        rows = struct.unpack_from(f"={count}i", peer.bytes, base + shape.pair_row_at + 4 * first)
        experts = struct.unpack_from(f"={count}i", peer.bytes, base + shape.pair_expert_at + 4 * first)
        if any(not 0 <= row < cell.w3 for row in rows):
            raise SegmentCorrupt(f"rows {rows} of {cell.w3}")
        at = self._own.areas.managed_offset + index * shape.result_bytes
        for row, expert in zip(rows, experts, strict=True):
            start = base + row * shape.row_bytes
            x = array("f", bytes(peer.bytes[start : start + shape.row_bytes]))
            self._own.bytes[at : at + shape.row_bytes] = array("f", [v * (expert + 1) for v in x]).tobytes()
            at += shape.row_bytes
        self._count += 1
        target = peer.cell_offset(self._rank * shape.num_microbatches + microbatch, 0)
        peer.write_cell(target, stamp(self._own.incarnation, self._count), cell.w1, count, cell.w0)
        peer.ring()
