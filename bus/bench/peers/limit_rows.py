"""What an MoE-shaped exchange cannot fall below here: its passes over the rows, and nothing else.

One shared block holds everybody's rows. Each rank packs its own rows into it, gathers the rows that are for its experts
(in A2E those of one attention rank after the other, as they come), works on them in place, and adds its own, in the
kernels of all other ways. No routing, no counts, no waiting: what a rank reads is what the others wrote a while ago,
which has the same value in every repetition. A duration is the CPU time of all ranks' passes, spread over the cores.
INT8 rows are [values | scale] as in messages, hence not aligned; ours are.
"""

from __future__ import annotations

import os
import time

import numpy as np

from bus.bench.meeting import Meeting, Message
from bus.bench.routing import A2E, DISPATCH, Int32Array, Shape, check_result, expert_factor, inputs
from bus.bench.rows import NUM_CHECKED, Bytes, wire_of
from bus.memory import _collectives
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment, segment_name

LIMIT = "limit"


class Passes:
    """One shape, set up. `numbers` keeps names of blocks apart."""

    def __init__(self, meeting: Meeting, shape: Shape, number: int) -> None:
        self._meeting, self._shape, self._wire = meeting, shape, wire_of(shape)
        rank, row_bytes = meeting.rank, self._wire.row_bytes
        self._given, self._factor = inputs(shape, rank), expert_factor(rank)
        ranks = [r for r in range(shape.num_ranks) if shape.num_tokens(r)]
        num_rows = len(ranks) * shape.batch
        num_pairs = num_rows * shape.top_k
        self._segment = self._open(number, (num_rows + num_pairs) * row_bytes)
        at = self._segment.layout.app_offset
        self._x: Bytes = self._segment.array(at, (num_rows, row_bytes), np.uint8)
        self._y: Bytes = self._segment.array(at + num_rows * row_bytes, (num_pairs, row_bytes), np.uint8)
        self._own = self._x[
            rank * shape.batch : (rank + 1) * shape.batch
        ]  # none beyond those that hold tokens
        self._places = np.empty((0,), np.int32)
        self._mine: list[
            tuple[Bytes, Int32Array]
        ] = []  # places of results, and the rows that they are made of
        for group in [ranks] if shape.form == DISPATCH else [[r] for r in ranks]:
            self._route(group)
        self._sum = np.empty(self._given.x.shape, np.float32)
        self._fill()
        meeting.gather()  # everybody's own rows are there

    def _route(self, group: list[int]) -> None:
        """Lay the pairs of these ranks out by owner, in their part of the results."""
        shape, rank = self._shape, self._meeting.rank
        topk = np.concatenate([inputs(shape, r).topk_idx for r in group]).reshape(-1)
        order = np.argsort(topk, kind="stable").astype(np.int32)
        owners = shape.first_expert_rank + topk[order] // shape.num_local_experts
        begin, end = (int(start) for start in np.searchsorted(owners, (rank, rank + 1)))
        own_pairs, first_row = shape.batch * shape.top_k, group[0] * shape.batch
        first_pair = group[0] * own_pairs
        if begin < end:
            results = self._y[first_pair + begin : first_pair + end]
            self._mine.append((results, first_row + order[begin:end] // shape.top_k))
        if rank in group:
            places = np.empty_like(order)
            places[order] = np.arange(first_pair, first_pair + order.size, dtype=np.int32)
            at = group.index(rank) * own_pairs
            self._places = places[at : at + own_pairs]

    def _open(self, number: int, num_bytes: int) -> Segment:
        name = segment_name(f"{self._meeting.name}l", "limit", 0, number)
        if self._meeting.rank == 0:
            layout = SegmentLayout(1, 0, num_bytes)
            segment = Segment.create(name, layout, service="limit", index=0, incarnation=number)
        self._meeting.gather()
        return segment if self._meeting.rank == 0 else Segment.attach(name)

    def run(self) -> None:
        """Pass over the rows as often as an exchange must."""
        self._fill()
        self._add()

    def _fill(self) -> None:
        given, wire = self._given, self._wire
        if self._own.size:
            np.copyto(self._own, wire.packed(given.x))
        for results, sources in self._mine:
            _collectives.gather_rows(results, sources, self._x, wire.row_bytes)
            wire.work(results, self._factor)

    def _add(self) -> None:
        weights, sizes = self._given.topk_weights, (*self._given.topk_idx.shape, self._shape.hidden)
        if self._own.size:
            self._wire.add(self._sum, self._y, self._places, weights, *sizes)

    def verify(self) -> None:
        """Exchange once, everybody in step; raise ValueError unless the sum is what an exchange gives."""
        self._meeting.gather()
        self._fill()
        self._meeting.gather()
        self._add()
        check_result(self._shape, self._given, self._sum)

    def close(self) -> None:
        """Remove the block once nobody uses it."""
        self._meeting.gather()
        self._x = self._y = self._own = np.empty((0, 0), np.uint8)
        self._mine.clear()
        self._segment.close()
        if self._meeting.rank == 0:
            self._segment.unlink()


class LimitRows:
    """See `bus.bench.rows.RowsWay`; dispatch + combine, and A2E + E2A."""

    numbers = 0  # of the blocks that this process has seen

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._passes: Passes | None = None

    def supports(self, case: Message) -> bool:
        """See `RowsWay`."""
        return case["form"] in (DISPATCH, A2E)

    def prepare(self, case: Message) -> None:
        """See `RowsWay`."""
        LimitRows.numbers += 1
        self._passes = Passes(self._meeting, Shape(**case), LimitRows.numbers)

    def check(self) -> None:
        """See `RowsWay`."""
        assert self._passes is not None
        for _ in range(NUM_CHECKED):
            self._passes.run()
        self._passes.verify()

    def measure(self, repetitions: int) -> list[int]:
        """See `RowsWay`. The mean, `repetitions` times: one pass among those of eight processes says nothing."""
        assert self._passes is not None
        begin = time.process_time_ns()
        for _ in range(repetitions):
            self._passes.run()
        used = time.process_time_ns() - begin
        cores = min(len(os.sched_getaffinity(0)), self._meeting.num_ranks)
        return [used * self._meeting.num_ranks // (cores * repetitions)] * repetitions

    def finish(self) -> None:
        """See `RowsWay`."""
        if self._passes is not None:
            self._passes.close()
        self._passes = None
