"""Ways of a collective, and dispatch + combine over any transport that swaps bytes between all ranks.

The message form does what ours does, step by step: sort the pairs by expert, swap counts per expert, gather rows into
one buffer, swap rows, let the experts work in place, swap rows back, add in top-k order. Buffers are made once per
shape. What it leaves out, in its favour: rows arrive grouped by source, and are not grouped again by expert.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bus.bench.meeting import Meeting, Message
from bus.bench.routing import Float32Array, Shape, check_result, expert_factor, inputs
from bus.memory import _collectives

Bytes = npt.NDArray[np.uint8]

PLAIN = "all-to-all"
PERSISTENT = "persistent"  # ways that prepare the plain exchange of two buffers once
NUM_CHECKED = 3
LEAD_IN = 4  # exchanges before those that are timed
SCALE_BYTES = 4


class RowsWay(Protocol):
    """A way of a collective, at one rank."""

    def supports(self, case: Message) -> bool:
        """Tell whether it plays this case."""

    def prepare(self, case: Message) -> None:
        """Set up for a case."""

    def check(self) -> None:
        """Exchange; ValueError if the result is wrong."""

    def measure(self, repetitions: int) -> list[int]:
        """Return the durations of exchanges, ns; none from a rank that only serves."""

    def finish(self) -> None:
        """Give up what `prepare` made."""


class Exchange(Protocol):
    """One case, set up."""

    def run(self) -> None:
        """Exchange once."""

    def verify(self) -> None:
        """Raise ValueError if the last result is wrong."""


class Transport(Protocol):
    """Bytes between all ranks. `out` and `into` hold the parts of all ranks, in rank order, without gaps."""

    def swap_equal(self, out: Bytes, into: Bytes) -> None:
        """Swap parts of equal size."""

    def swap(self, out: Bytes, sent: list[int], into: Bytes, received: list[int]) -> None:
        """Swap parts of `sent` bytes to, and `received` bytes from, each rank."""


class MessageWay:
    """Every collective over a transport."""

    def __init__(self, transport: Transport, meeting: Meeting) -> None:
        self._transport, self._meeting = transport, meeting
        self._exchange: Exchange | None = None
        self._is_timed = True

    def supports(self, case: Message) -> bool:
        """See `RowsWay`."""
        return True

    def prepare(self, case: Message) -> None:
        """See `RowsWay`."""
        rank, num_ranks = self._meeting.rank, self._meeting.num_ranks
        if case["form"] == PLAIN:
            self._exchange, self._is_timed = Plain(self._transport, rank, num_ranks, case["size"]), True
        else:
            shape = Shape(**case)
            self._exchange = Rows(self._transport, shape, rank)
            self._is_timed = shape.num_tokens(rank) > 0

    def check(self) -> None:
        """See `RowsWay`."""
        assert self._exchange is not None
        for _ in range(NUM_CHECKED):
            self._exchange.run()
        self._exchange.verify()

    def measure(self, repetitions: int) -> list[int]:
        """See `RowsWay`."""
        assert self._exchange is not None
        durations = timed(self._exchange, repetitions)
        return durations if self._is_timed else []

    def finish(self) -> None:
        """See `RowsWay`."""
        self._exchange = None


def timed(exchange: Exchange, repetitions: int) -> list[int]:
    """Return the durations of so many exchanges, ns.

    Some before and one after them are not timed: ranks come from the harness one after the other, with cold caches, and
    who is done reports while others still exchange.
    """
    run, now = exchange.run, time.monotonic_ns
    for _ in range(LEAD_IN):
        run()
    stamps = [now()]
    for _ in range(repetitions):
        run()
        stamps.append(now())
    run()
    return [int(value) for value in np.diff(stamps)]


class Plain:
    """Every rank sends `size` bytes to every rank."""

    def __init__(self, transport: Transport, rank: int, num_ranks: int, size: int) -> None:
        self._transport = transport
        self.out, self.into, self._wanted = plain_blocks(rank, num_ranks, size)

    def run(self) -> None:
        """See `Exchange`."""
        self._transport.swap_equal(self.out, self.into)

    def verify(self) -> None:
        """See `Exchange`."""
        check_plain(self.into, self._wanted)


def plain_blocks(rank: int, num_ranks: int, size: int) -> tuple[Bytes, Bytes, Bytes]:
    """Return what `rank` sends, room for what it receives, and the first byte that it must receive from each rank."""
    ranks = np.arange(num_ranks)
    out = np.repeat((rank * 16 + ranks + 1).astype(np.uint8), size)
    return out, np.zeros(num_ranks * size, np.uint8), (ranks * 16 + rank + 1).astype(np.uint8)


def check_plain(into: Bytes, wanted: Bytes) -> None:
    """Raise ValueError unless every rank's part is all its own byte."""
    if not (into.reshape(wanted.size, -1) == wanted[:, None]).all():
        raise ValueError("wrong result: a part is not what its rank sent")


class Rows:
    """Dispatch + combine, or A2E + E2A, at one rank."""

    def __init__(self, transport: Transport, shape: Shape, rank: int) -> None:
        self._transport, self._shape, self._given = transport, shape, inputs(shape, rank)
        self._factor = expert_factor(rank)
        num_pairs = self._given.topk_idx.size
        self._wire = wire_of(shape)
        self._order, self._starts = np.empty(num_pairs, np.int32), np.empty(shape.num_experts + 1, np.int32)
        self._position, self._places = np.empty(num_pairs, np.int32), np.arange(num_pairs, dtype=np.int32)
        self._counts = np.zeros((shape.num_ranks, shape.num_local_experts), np.int32)
        self._found = np.empty_like(self._counts)
        experts = shape.rows_max if rank >= shape.first_expert_rank else 0
        self._out = np.empty((num_pairs, self._wire.row_bytes), np.uint8)
        self._into = np.empty((experts, self._wire.row_bytes), np.uint8)
        self._back = np.empty((num_pairs, self._wire.row_bytes), np.uint8)
        self._sum = np.empty(self._given.x.shape, np.float32)

    def run(self) -> None:
        """See `Exchange`."""
        shape, given, wire = self._shape, self._given, self._wire
        _collectives.partition(given.topk_idx, shape.num_experts, self._order, self._starts)
        self._counts[shape.first_expert_rank :] = np.diff(self._starts).reshape(-1, shape.num_local_experts)
        self._transport.swap_equal(
            self._counts.reshape(-1).view(np.uint8), self._found.reshape(-1).view(np.uint8)
        )
        sent = (self._counts.sum(axis=1) * wire.row_bytes).tolist()
        received = (self._found.sum(axis=1) * wire.row_bytes).tolist()
        _collectives.gather_rows(self._out, self._order // shape.top_k, wire.packed(given.x), wire.row_bytes)
        num = sum(received) // wire.row_bytes
        into = self._into[:num]
        self._transport.swap(self._out.reshape(-1), sent, into.reshape(-1), received)
        wire.work(into, self._factor)
        self._transport.swap(into.reshape(-1), received, self._back.reshape(-1), sent)
        self._position[self._order] = self._places
        sizes = given.x.shape[0], shape.top_k, shape.hidden
        wire.add(self._sum, self._back, self._position, given.topk_weights, *sizes)

    def verify(self) -> None:
        """See `Exchange`."""
        check_result(self._shape, self._given, self._sum)


def wire_of(shape: Shape) -> Wire:
    """Return how rows of the shape's kind travel."""
    return Int8Wire(shape) if shape.kind == "int8" else Float32Wire(shape)


class Wire(Protocol):
    """How rows travel, and what is done with them as they are: [rows, row_bytes] uint8."""

    row_bytes: int
    add: Callable[..., None]  # (out, rows, index, weights, num_rows, top_k, hidden), in top-k order

    def packed(self, x: Float32Array) -> Bytes:
        """Return the rows of `x`; valid until the next call."""

    def work(self, rows: Bytes, factor: np.float32) -> None:
        """Do the experts' work: multiply every row by `factor`, in place."""


class Float32Wire:
    """As they are: no copy."""

    def __init__(self, shape: Shape) -> None:
        self.row_bytes = 4 * shape.hidden
        self.add = _collectives.weighted_sum

    def packed(self, x: Float32Array) -> Bytes:
        """See `Wire`."""
        return x.view(np.uint8)

    def work(self, rows: Bytes, factor: np.float32) -> None:
        """See `Wire`."""
        values = rows.view(np.float32)
        np.multiply(values, factor, out=values)


class Int8Wire:
    """[hidden int8 | scale float32], so that a row and its scale are one message; widened only while they are added."""

    def __init__(self, shape: Shape) -> None:
        self._hidden, self.row_bytes = shape.hidden, shape.hidden + SCALE_BYTES
        self._q = np.empty((shape.batch, shape.hidden), np.int8)
        self._scale = np.empty((shape.batch, 1), np.float32)
        self._rows = np.empty((shape.batch, self.row_bytes), np.uint8)
        self.add = _collectives.weighted_sum_int8

    def packed(self, x: Float32Array) -> Bytes:
        """See `Wire`."""
        num, hidden = x.shape
        q, scale, rows = self._q[:num], self._scale[:num], self._rows[:num]
        _collectives.quantise(q, scale, x, num, hidden)
        rows[:, :hidden] = q.view(np.uint8)
        rows[:, hidden:] = scale.view(np.uint8)
        return rows

    def work(self, rows: Bytes, factor: np.float32) -> None:
        """See `Wire`. A row is multiplied by multiplying its scale."""
        scales = rows[:, self._hidden :].view(np.float32)
        np.multiply(scales, factor, out=scales)
