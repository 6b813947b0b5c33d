"""A2E / E2A of the second implementation, after bus/README.md: both ends, direct and through trampolines.

Float32, or INT8 that experts take and give as float32. One exchange at a time, on any microbatch.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from tests.interop.second import (
    COUNTER_BITS,
    Areas,
    Cell,
    PeerDied,
    Segment,
    SegmentCorrupt,
    round_up,
    stamp,
    wait_for,
)
from tests.interop.second_rows import Row, Rows

LINE = 64
DEAD = 1 << 63  # in w2 of a trampoline's answer: the rest is the expert rank that has ended


@dataclass(frozen=True)
class Shape:
    """What all ranks have agreed on."""

    num_attention: int
    num_experts: int
    rows_max: int
    num_slots: int
    hidden: int
    num_microbatches: int = 1
    num_domains: int = 1
    has_trampolines: bool = False
    int8: bool = False

    # ------------------------------------------------------------------ trampolines

    @property
    def domain_ranks(self) -> int:
        """Attention ranks of a domain."""
        return -(-self.num_attention // self.num_domains)

    @property
    def num_seats(self) -> int:
        """Seats at each trampoline."""
        return self.num_domains * -(-self.domain_ranks // self.num_experts) if self.has_trampolines else 0

    def trampoline_of(self, attention: int) -> tuple[int, int]:
        """Return the expert rank that forwards for an attention rank, and the seat there."""
        domain, place = divmod(attention, self.domain_ranks)
        rounds = -(-self.domain_ranks // self.num_experts)
        return place % self.num_experts, domain * rounds + place // self.num_experts

    def guests(self, trampoline: int) -> dict[int, int]:
        """Return the attention ranks of a trampoline by seat; not every seat is taken."""
        places = {i: self.trampoline_of(i) for i in range(self.num_attention)}
        return {seat: i for i, (t, seat) in places.items() if t == trampoline}

    # ------------------------------------------------------------------ blocks

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.hidden if self.int8 else 4 * self.hidden

    @property
    def pairs_max(self) -> int:
        """Largest number of pairs."""
        return self.rows_max * self.num_slots

    @property
    def x_scale_at(self) -> int:
        """Offset of `x_scale` in a source block."""
        return round_up(self.rows_max * self.row_bytes, LINE)

    @property
    def starts_at(self) -> int:
        """Offset of `starts`."""
        return self.x_scale_at + (round_up(4 * self.rows_max, LINE) if self.int8 else 0)

    @property
    def pair_row_at(self) -> int:
        """Offset of `pair_row`."""
        return self.starts_at + round_up(4 * (self.num_experts + 1), LINE)

    @property
    def pair_expert_at(self) -> int:
        """Offset of `pair_expert`."""
        return self.pair_row_at + round_up(4 * self.pairs_max, LINE)

    @property
    def source_bytes(self) -> int:
        """Bytes of a source block."""
        return self.pair_expert_at + round_up(4 * self.pairs_max, LINE)

    @property
    def y_scale_at(self) -> int:
        """Offset of `y_scale` in a result block."""
        return round_up(self.pairs_max * self.row_bytes, LINE)

    @property
    def result_bytes(self) -> int:
        """Bytes of a result block."""
        return self.y_scale_at + (round_up(4 * self.pairs_max, LINE) if self.int8 else 0)

    def result_at(self, attention: int, microbatch: int) -> int:
        """Offset of an expert rank's result block in its managed area."""
        return (attention * self.num_microbatches + microbatch) * self.result_bytes

    def seat_source_at(self, seat: int, microbatch: int) -> int:
        """Offset of a trampoline's copy of a source block."""
        before = self.num_attention * self.num_microbatches * self.result_bytes
        return before + (seat * self.num_microbatches + microbatch) * self.source_bytes

    def seat_result_at(self, seat: int, microbatch: int) -> int:
        """Offset of what a trampoline collects."""
        before = self.seat_source_at(self.num_seats, 0)
        return before + (seat * self.num_microbatches + microbatch) * self.result_bytes

    def attention_areas(self) -> Areas:
        """Return the areas of an attention rank's segment."""
        count = self.num_microbatches
        return Areas.of((self.num_experts + 1) * count, count * self.source_bytes, 0)

    def expert_areas(self) -> Areas:
        """Return the areas of an expert rank's segment."""
        kinds = 2 * self.num_attention + (1 + self.num_experts) * self.num_seats
        return Areas.of(kinds * self.num_microbatches, self.seat_result_at(self.num_seats, 0), 0)


@dataclass(frozen=True)
class Pair:
    """A (row, slot) with an expert."""

    row: int
    slot: int
    rank: int
    expert: int


class _Block:
    """A source or a result block: its place in a segment."""

    def __init__(self, segment: Segment, offset: int, shape: Shape) -> None:
        self.segment, self.base, self._shape = segment, segment.areas.managed_offset + offset, shape

    def x(self) -> Rows:
        """Return the rows of a source block."""
        return self._rows(self._shape.x_scale_at)

    def y(self) -> Rows:
        """Return the rows of a result block."""
        return self._rows(self._shape.y_scale_at)

    def _rows(self, scales_at: int) -> Rows:
        scales = self.base + scales_at
        return Rows(self.segment.bytes, self.base, scales, self._shape.hidden, self._shape.int8)

    def put_words(self, at: int, words: list[int]) -> None:
        """Store i32 words."""
        struct.pack_into(f"={len(words)}i", self.segment.bytes, self.base + at, *words)

    def words(self, at: int, count: int) -> tuple[int, ...]:
        """Return i32 words."""
        return struct.unpack_from(f"={count}i", self.segment.bytes, self.base + at)


class Attention:
    """The attention rank's end."""

    def __init__(self, own: Segment, experts: list[Segment], shape: Shape, rank: int) -> None:
        self._own, self._experts, self._shape, self._rank = own, experts, shape, rank
        self._count = 0

    def exchange(
        self, rows: list[Row], pairs: list[Pair], event: int, deadline_s: float, *, through: bool = False
    ) -> dict[tuple[int, int], Row]:
        """Send rows to the ranks of their pairs and return each pair's result by (row, slot).

        `through`: by way of the trampoline. PeerDied names an expert rank.
        """
        pairs = sorted(pairs, key=lambda pair: (pair.rank, pair.row, pair.slot))
        starts = [sum(pair.rank < r for pair in pairs) for r in range(len(self._experts) + 1)]
        self._stage(rows, pairs, starts, event >> 16 & 0xF)
        if not pairs:
            return {}
        if through:
            return self._through(pairs, event, len(rows), deadline_s)
        asked = [r for r in range(len(self._experts)) if starts[r + 1] > starts[r]]
        words = {r: self._tell(r, event, starts[r], starts[r + 1] - starts[r], len(rows)) for r in asked}
        found: dict[tuple[int, int], Row] = {}
        for r, word in words.items():
            found |= self._collect(r, event, word, pairs[starts[r] : starts[r + 1]], deadline_s)
        return found

    def _stage(self, rows: list[Row], pairs: list[Pair], starts: list[int], microbatch: int) -> None:
        shape = self._shape
        block = _Block(self._own, microbatch * shape.source_bytes, shape)
        x = block.x()
        for i, row in enumerate(rows):
            x.put(i, row)
        block.put_words(shape.starts_at, starts)
        block.put_words(shape.pair_row_at, [pair.row for pair in pairs])
        block.put_words(shape.pair_expert_at, [pair.expert for pair in pairs])

    def _write(self, r: int, number: int, w1: int, w2: int, w3: int) -> int:
        self._count += 1
        word, peer = stamp(self._own.incarnation, self._count), self._experts[r]
        peer.write_cell(peer.cell_offset(number, 0), word, w1, w2, w3)
        peer.ring()
        return word

    def _tell(self, r: int, event: int, first: int, count: int, num_rows: int) -> int:
        number = self._rank * self._shape.num_microbatches + (event >> 16 & 0xF)
        return self._write(r, number, event, first << 32 | count, num_rows)

    def _await(self, r: int, number: int, event: int, word: int, count: int, deadline_s: float) -> None:
        offset = self._own.cell_offset(number, 0)

        def look() -> Cell | None:
            cell = self._own.read_cell(offset)
            return cell if cell is not None and (cell.w1, cell.w3) == (event, word) else None

        cell = wait_for(self._own, self._experts[r], look, deadline_s, f"no answer of expert rank {r}")
        if cell.w2 & DEAD:
            raise PeerDied(f"expert rank {cell.w2 & ~DEAD} has ended")
        if cell.w2 != count:
            raise SegmentCorrupt(f"{cell.w2} results for {count} pairs")

    def _collect(
        self, r: int, event: int, word: int, share: list[Pair], deadline_s: float
    ) -> dict[tuple[int, int], Row]:
        shape, microbatch = self._shape, event >> 16 & 0xF
        self._await(r, r * shape.num_microbatches + microbatch, event, word, len(share), deadline_s)
        y = _Block(self._experts[r], shape.result_at(self._rank, microbatch), shape).y()
        return {(pair.row, pair.slot): y.widened(k) for k, pair in enumerate(share)}

    def _through(
        self, pairs: list[Pair], event: int, num_rows: int, deadline_s: float
    ) -> dict[tuple[int, int], Row]:
        shape, microbatch = self._shape, event >> 16 & 0xF
        t, seat = shape.trampoline_of(self._rank)
        number = (2 * shape.num_attention + seat) * shape.num_microbatches + microbatch
        word = self._write(t, number, event, len(pairs), num_rows)
        number = shape.num_experts * shape.num_microbatches + microbatch
        self._await(t, number, event, word, len(pairs), deadline_s)
        y = _Block(self._experts[t], shape.seat_result_at(seat, microbatch), shape).y()
        return {(pair.row, pair.slot): y.widened(k) for k, pair in enumerate(pairs)}


@dataclass
class _Guest:
    """What a trampoline has open at a seat."""

    cell: Cell
    starts: tuple[int, ...]
    words: dict[int, int]  # owner -> stamp of the cell that asked it
    missing: set[int] = field(default_factory=set)


class Expert:
    """The expert rank's end: its experts multiply a row by their id plus one; it forwards for its guests."""

    def __init__(
        self, own: Segment, attention: list[Segment], experts: list[Segment], shape: Shape, rank: int
    ) -> None:
        self._own, self._attention, self._experts = own, attention, experts
        self._shape, self._rank = shape, rank
        self._seen: dict[int, int] = {}
        self._seats = shape.guests(rank)
        self._guests: dict[tuple[int, int], _Guest] = {}  # by seat and microbatch
        self._count = 0
        self.num_answered = self.num_forwarded = 0

    def poll(self) -> bool:
        """Do what has come; tell whether something had."""
        shape, done = self._shape, False
        count, seats = shape.num_attention, shape.num_seats
        for kind, (number, microbatch) in self._kinds():
            if kind < count:
                done |= self._owner(number, microbatch, self._attention[kind], kind, is_forward=False)
            elif kind < 2 * count:
                t, _ = shape.trampoline_of(kind - count)
                done |= self._owner(number, microbatch, self._experts[t], kind - count, is_forward=True)
            elif kind < 2 * count + seats:
                done |= self._forward(number, microbatch, kind - 2 * count)
            else:
                r, seat = divmod(kind - 2 * count - seats, seats)
                done |= self._gather(number, microbatch, r, seat)
        return done

    def _kinds(self) -> Iterator[tuple[int, tuple[int, int]]]:
        for number in range(self._shape.expert_areas().num_cells):
            kind, microbatch = divmod(number, self._shape.num_microbatches)
            yield kind, (number, microbatch)

    def wait(self, seconds: float) -> None:
        """Sleep until somebody rings."""
        self._own.sleep_unless(lambda: self.poll() or None, seconds)

    def _take(self, number: int, writer: Segment) -> Cell | None:
        """Return what is new on a cell, from the known incarnation."""
        cell = self._own.read_cell(self._own.cell_offset(number, 0))
        if cell is None or self._seen.get(number) == cell.w0:
            return None
        self._seen[number] = cell.w0
        return cell if cell.w0 >> COUNTER_BITS == writer.incarnation % 2**24 else None

    def _write(self, peer: Segment, number: int, w1: int, w2: int, w3: int) -> int:
        self._count += 1
        word = stamp(self._own.incarnation, self._count)
        peer.write_cell(peer.cell_offset(number, 0), word, w1, w2, w3)
        peer.ring()
        return word

    # ------------------------------------------------------------------ owner

    def _owner(
        self, number: int, microbatch: int, writer: Segment, attention: int, *, is_forward: bool
    ) -> bool:
        cell, shape = self._take(number, writer), self._shape
        if cell is None:
            return False
        t, seat = shape.trampoline_of(attention)
        at = shape.seat_source_at(seat, microbatch) if is_forward else microbatch * shape.source_bytes
        count = self._compute(_Block(writer, at, shape), cell, attention, microbatch)
        self.num_answered += 1
        if is_forward:
            kind = 2 * shape.num_attention + shape.num_seats + self._rank * shape.num_seats + seat
            self._write(self._experts[t], kind * shape.num_microbatches + microbatch, cell.w1, count, cell.w0)
        else:
            number = self._rank * shape.num_microbatches + microbatch
            self._write(writer, number, cell.w1, count, cell.w0)
        return True

    def _compute(self, source: _Block, cell: Cell, attention: int, microbatch: int) -> int:
        shape, first, count = self._shape, cell.w2 >> 32, cell.w2 % 2**32
        if first + count > shape.pairs_max or cell.w3 > shape.rows_max or cell.w1 >> 16 & 0xF != microbatch:
            raise SegmentCorrupt(f"pairs {first} + {count}, rows {cell.w3}, event {cell.w1:#x}")
        rows = source.words(shape.pair_row_at + 4 * first, count)
        experts = source.words(shape.pair_expert_at + 4 * first, count)
        if any(not 0 <= row < cell.w3 for row in rows):
            raise SegmentCorrupt(f"rows {rows} of {cell.w3}")
        x, y = source.x(), _Block(self._own, shape.result_at(attention, microbatch), shape).y()
        for k, (row, expert) in enumerate(zip(rows, experts, strict=True)):
            y.put(k, array("f", [v * (expert + 1) for v in x.widened(row)]))
        return count

    # ------------------------------------------------------------------ trampoline

    def _forward(self, number: int, microbatch: int, seat: int) -> bool:
        shape, attention = self._shape, self._seats.get(seat)
        cell = None if attention is None else self._take(number, self._attention[attention])
        if attention is None or cell is None:
            return False
        source = _Block(self._attention[attention], microbatch * shape.source_bytes, shape)
        copy = _Block(self._own, shape.seat_source_at(seat, microbatch), shape)
        data = source.segment.bytes[source.base : source.base + shape.source_bytes]
        copy.segment.bytes[copy.base : copy.base + shape.source_bytes] = data
        starts = copy.words(shape.starts_at, shape.num_experts + 1)
        if starts[0] != 0 or starts[-1] != cell.w2 or list(starts) != sorted(starts):
            raise SegmentCorrupt(f"starts {starts} for {cell.w2} pairs")
        guest = self._guests[seat, microbatch] = _Guest(cell, starts, {})
        target = (shape.num_attention + attention) * shape.num_microbatches + microbatch
        for r, (first, behind) in enumerate(pairwise(starts)):
            if behind > first:
                w2 = first << 32 | behind - first
                guest.words[r] = self._write(self._experts[r], target, cell.w1, w2, cell.w3)
        guest.missing = set(guest.words)
        self.num_forwarded += 1
        return True

    def _gather(self, number: int, microbatch: int, r: int, seat: int) -> bool:
        cell, guest = self._take(number, self._experts[r]), self._guests.get((seat, microbatch))
        if cell is None:
            return False
        if guest is None or r not in guest.missing or cell.w3 != guest.words[r]:
            return True  # of an exchange that was replaced
        shape, attention = self._shape, self._seats[seat]
        if cell.w2 != guest.starts[r + 1] - guest.starts[r]:
            raise SegmentCorrupt(f"{cell.w2} results of expert rank {r}")
        theirs = _Block(self._experts[r], shape.result_at(attention, microbatch), shape).y()
        whole = _Block(self._own, shape.seat_result_at(seat, microbatch), shape).y()
        for k in range(cell.w2):
            whole.put(guest.starts[r] + k, theirs.get(k))
        guest.missing.remove(r)
        if not guest.missing:
            self._answer(guest, attention, seat, microbatch, guest.cell.w2)
        return True

    def look_for_the_dead(self) -> None:
        """Report an owner that has ended to the guests that wait for it."""
        for (seat, microbatch), guest in list(self._guests.items()):
            others = guest.missing - {self._rank}  # the own lock does not stop its holder
            dead = [r for r in others if not self._experts[r].owner_alive()]
            if dead:
                self._answer(guest, self._seats[seat], seat, microbatch, DEAD | dead[0])

    def _answer(self, guest: _Guest, attention: int, seat: int, microbatch: int, w2: int) -> None:
        del self._guests[seat, microbatch]
        number = self._shape.num_experts * self._shape.num_microbatches + microbatch
        self._write(self._attention[attention], number, guest.cell.w1, w2, guest.cell.w0)
