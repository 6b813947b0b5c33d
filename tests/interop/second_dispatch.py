"""Dispatch and combine of the second implementation: float32 and both forms of INT8, after bus/README.md.

Rows are those of second_rows.py.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from tests.interop.second import PAGE, Areas, Cell, Segment, SegmentCorrupt, round_up
from tests.interop.second_group import ANSWERS, LANES, WITHDRAWN, Group
from tests.interop.second_rows import Int8Row, Row, Rows, rounded

LINE = 64


@dataclass(frozen=True)
class Shape:
    """What all ranks have agreed on."""

    num_ranks: int
    max_tokens: int
    top_k: int
    hidden: int
    num_local_experts: int
    num_microbatches: int = 1
    int8: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in shared memory."""
        return self.hidden if self.int8 else 4 * self.hidden

    @property
    def num_experts(self) -> int:
        """Experts of the group."""
        return self.num_ranks * self.num_local_experts

    @property
    def pairs_max(self) -> int:
        """Rows of y."""
        return self.num_ranks * self.max_tokens * self.top_k

    def areas(self) -> Areas:
        """Return the areas of a rank's segment."""
        cells = self.num_ranks * self.num_microbatches * LANES
        return Areas.of(cells, self.num_microbatches * Block.of(self).size, 0)


@dataclass(frozen=True)
class Block:
    """Offsets in a block, and its bytes."""

    x: int
    x_scale: int
    starts: int
    pair_row: int
    y_start: int
    y_scale: int
    y: int
    size: int

    @classmethod
    def of(cls, shape: Shape) -> Block:
        """Lay the parts one after another."""
        sizes = (
            shape.max_tokens * shape.row_bytes,
            4 * shape.max_tokens,
            4 * (shape.num_experts + 1),
            4 * shape.max_tokens * shape.top_k,
            4 * shape.num_experts,
            4 * shape.pairs_max,
        )
        places = [0]
        for size in sizes:
            places.append(round_up(places[-1] + size, LINE))
        y = round_up(places.pop(), PAGE)
        return cls(*places, y, round_up(y + shape.pairs_max * shape.row_bytes, PAGE))


@dataclass(frozen=True)
class Pair:
    """A (token, slot) with an expert."""

    expert: int
    token: int
    slot: int


@dataclass(frozen=True)
class Arrived:
    """A row that came, as float32 or INT8, and whose it is."""

    expert: int
    source: int
    row: Row | Int8Row


def add(rows: Iterable[tuple[float, Row]], hidden: int) -> Row:
    """Return 0 + weight * row + ..., every step rounded to float32."""
    total = [0.0] * hidden
    for weight, row in rows:
        total = [rounded(t + rounded(weight * v)) for t, v in zip(total, row, strict=True)]
    return array("f", total)


@dataclass
class _Open:
    """An exchange of a microbatch that has not ended."""

    event: int
    lane: int
    num_tokens: int
    pairs: list[Pair]
    starts: list[int]
    counts: dict[int, Cell] = field(default_factory=dict)
    num_arrived: int = 0


class Exchange:
    """One rank's end. `takes_int8`: its experts take and give `Int8Row`, where rows travel so."""

    def __init__(
        self, segments: Sequence[Segment], shape: Shape, rank: int, *, takes_int8: bool = False
    ) -> None:
        self._group = Group(segments, rank, shape.num_microbatches)
        self._shape, self._block, self._rank, self._takes_int8 = shape, Block.of(shape), rank, takes_int8
        self._num_announced = [0] * shape.num_microbatches
        self._open: dict[int, _Open] = {}

    def _base(self, rank: int, microbatch: int) -> int:
        return self._group.segments[rank].areas.managed_offset + microbatch * self._block.size

    def _x(self, rank: int, microbatch: int) -> Rows:
        return self._rows(rank, microbatch, self._block.x, self._block.x_scale)

    def _y(self, rank: int, microbatch: int) -> Rows:
        return self._rows(rank, microbatch, self._block.y, self._block.y_scale)

    def _rows(self, rank: int, microbatch: int, at: int, scales_at: int) -> Rows:
        base, view = self._base(rank, microbatch), self._group.segments[rank].bytes
        return Rows(view, base + at, base + scales_at, self._shape.hidden, self._shape.int8)

    def _share(self, starts: Sequence[int], rank: int) -> tuple[int, int]:
        """Return the first pair of `rank`'s experts, and the first behind them."""
        local = self._shape.num_local_experts
        return starts[rank * local], starts[(rank + 1) * local]

    # ------------------------------------------------------------------ dispatch

    def dispatch(
        self, rows: Sequence[Row], experts: Sequence[Sequence[int]], event: int, deadline_s: float
    ) -> list[Arrived]:
        """Send every row to its experts' ranks; return what came, in the order in which `combine` wants results."""
        self.announce(rows, experts, event)
        return self.receive(event, deadline_s)

    def announce(self, rows: Sequence[Row], experts: Sequence[Sequence[int]], event: int) -> None:
        """Steps 1 and 2. What is open of the microbatch is given up."""
        microbatch = event >> 16 & 0xF
        self.give_up(microbatch)
        slots = [Pair(e, t, k) for t, chosen in enumerate(experts) for k, e in enumerate(chosen) if e >= 0]
        pairs = sorted(slots, key=lambda pair: (pair.expert, pair.token, pair.slot))
        starts = [sum(pair.expert < e for pair in pairs) for e in range(self._shape.num_experts + 1)]
        self._stage(rows, pairs, starts, microbatch)
        lane = LANES * microbatch + self._num_announced[microbatch] % 2
        self._num_announced[microbatch] += 1
        self._open[microbatch] = _Open(event, lane, len(rows), pairs, starts)
        for rank in self._group.others():
            first, behind = self._share(starts, rank)
            self._group.tell(rank, lane, event, first << 32 | behind - first, len(rows))
        self._group.ring()

    def _stage(self, rows: Sequence[Row], pairs: list[Pair], starts: list[int], microbatch: int) -> None:
        view, block, base = self._group.own.bytes, self._block, self._base(self._rank, microbatch)
        x = self._x(self._rank, microbatch)
        for i, row in enumerate(rows):
            x.put(i, row)
        struct.pack_into(f"={len(starts)}i", view, base + block.starts, *starts)
        struct.pack_into(f"={len(pairs)}i", view, base + block.pair_row, *(pair.token for pair in pairs))

    def receive(self, event: int, deadline_s: float) -> list[Arrived]:
        """Steps 3 and 4."""
        microbatch = event >> 16 & 0xF
        opened, lane = self._open[microbatch], LANES * microbatch
        others = list(self._group.others())
        counts = self._group.collect(others, lambda rank: self._group.count_of(rank, lane, event), deadline_s)
        first, behind = self._share(opened.starts, self._rank)
        counts[self._rank] = Cell(1, event, first << 32 | behind - first, opened.num_tokens)
        try:
            arrived = self._pull(microbatch, counts)
        finally:
            self._look_again(lane, counts)  # if a source has left meanwhile, its words mean nothing
        opened.counts, opened.num_arrived = counts, len(arrived)
        return arrived

    def _pull(self, microbatch: int, counts: dict[int, Cell]) -> list[Arrived]:
        shape, block = self._shape, self._block
        tokens = {rank: self._tokens_of(rank, microbatch, counts[rank]) for rank in range(shape.num_ranks)}
        arrived: list[Arrived] = []
        places: list[list[int]] = [[] for _ in tokens]
        for expert in range(shape.num_local_experts):
            for source, found in tokens.items():
                x = self._x(source, microbatch)
                places[source].append(len(arrived))
                for token in found[expert]:
                    row = x.get(token) if self._takes_int8 else x.widened(token)
                    arrived.append(Arrived(expert, source, row))
        flat = [place for row in places for place in row]
        at = self._base(self._rank, microbatch) + block.y_start
        struct.pack_into(f"={len(flat)}i", self._group.own.bytes, at, *flat)
        return arrived

    def _tokens_of(self, rank: int, microbatch: int, cell: Cell) -> list[Sequence[int]]:
        """Return the tokens of a source's pairs for each local expert. SegmentCorrupt: they cannot be."""
        shape, block, view = self._shape, self._block, self._group.segments[rank].bytes
        first, count, tokens = cell.w2 >> 32, cell.w2 % 2**32, cell.w3
        local = shape.num_local_experts
        if tokens > shape.max_tokens or first + count > tokens * shape.top_k:
            raise SegmentCorrupt(f"rank {rank}: pairs {first} + {count} of {tokens} tokens")
        if count == 0:
            return [()] * local
        base = self._base(rank, microbatch)
        starts = struct.unpack_from(f"={local + 1}i", view, base + block.starts + 4 * self._rank * local)
        if starts[0] != first or starts[-1] != first + count or list(starts) != sorted(starts):
            raise SegmentCorrupt(f"rank {rank}: starts {starts} for pairs {first} + {count}")
        rows = struct.unpack_from(f"={count}i", view, base + block.pair_row + 4 * first)
        if any(not 0 <= row < tokens for row in rows):
            raise SegmentCorrupt(f"rank {rank}: rows {rows} of {tokens}")
        return [rows[starts[e] - first : starts[e + 1] - first] for e in range(local)]

    def _look_again(self, lane: int, counts: dict[int, Cell]) -> None:
        for rank, cell in counts.items():
            if rank != self._rank and cell.w2 % 2**32 > 0:
                self._group.look_again(rank, lane, cell)

    # ------------------------------------------------------------------ combine

    def combine(
        self,
        results: Sequence[Row | Int8Row],
        weights: Sequence[Sequence[float]],
        event: int,
        deadline_s: float,
    ) -> list[Row]:
        """Steps 5 to 7: give the others their results, and return the weighted sums of the own tokens."""
        microbatch = event >> 16 & 0xF
        opened, y = self._open[microbatch], self._y(self._rank, microbatch)
        assert len(results) == opened.num_arrived
        for i, row in enumerate(results):
            y.put(i, row)
        lane = LANES * microbatch
        for rank in self._group.others():
            count = opened.counts[rank].w2 % 2**32
            if count > 0:
                self._group.tell(rank, lane + ANSWERS, event, count, 0)
        self._group.ring()
        asked = {rank: self._share(opened.starts, rank) for rank in self._group.others()}
        owed = {rank: behind - first for rank, (first, behind) in asked.items() if behind > first}
        answers = self._group.collect(
            list(owed), lambda rank: self._group.answer_of(rank, lane, event), deadline_s
        )
        for rank, cell in answers.items():
            if cell.w2 != owed[rank]:
                raise SegmentCorrupt(f"rank {rank}: {cell.w2} results for {owed[rank]} pairs")
        sums = self._sums(opened, microbatch, weights)
        del self._open[microbatch]
        return sums

    def _sums(self, opened: _Open, microbatch: int, weights: Sequence[Sequence[float]]) -> list[Row]:
        terms: list[list[tuple[int, float, Row]]] = [[] for _ in range(opened.num_tokens)]
        for p, pair in enumerate(opened.pairs):
            owner, local = divmod(pair.expert, self._shape.num_local_experts)
            base, block = self._base(owner, microbatch), self._block
            at = base + block.y_start + 4 * (self._rank * self._shape.num_local_experts + local)
            count = opened.starts[pair.expert + 1] - opened.starts[pair.expert]
            place: int = struct.unpack_from("=i", self._group.segments[owner].bytes, at)[0]
            if not 0 <= place <= self._shape.pairs_max - count:
                raise SegmentCorrupt(f"rank {owner}: row {place} of {self._shape.pairs_max}")
            place += p - opened.starts[pair.expert]
            row = self._y(owner, microbatch).widened(place)
            terms[pair.token].append((pair.slot, weights[pair.token][pair.slot], row))
        return [
            add([(weight, row) for _, weight, row in sorted(token, key=itemgetter(0))], self._shape.hidden)
            for token in terms
        ]

    def give_up(self, microbatch: int) -> None:
        """Withdraw what is open, so that nobody takes what will be staged next for it."""
        opened = self._open.pop(microbatch, None)
        if opened is not None:
            for rank in self._group.others():
                self._group.tell(rank, opened.lane, opened.event, WITHDRAWN, 0)
            self._group.ring()
