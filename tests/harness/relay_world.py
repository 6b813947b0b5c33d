"""Attention and expert ranks of A2E/E2A in one process and one thread, pumped by hand."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import SegmentCorrupt
from bus.memory.segment import Segment, segment_name
from bus.xccl.cost import UNMEASURED, CostRule
from bus.xccl.endpoint import Rank
from bus.xccl.group import AddressTable
from bus.xccl.relay import Arrival, Int8Arrival, RoutedExpert
from bus.xccl.relay_layout import RelayShape
from bus.xccl.trampoline import RoutedAttention, RoutedHandle
from tests.harness.dispatch_world import expert_product, int8_product

CONFIG = XcclConfig(spin_us=0, poll_interval_ms=5)


def raise_error(error: SegmentCorrupt) -> None:
    raise error


@dataclass
class RelayWorld:
    """All ranks; every one has an address table of its own."""

    shape: RelayShape
    rule: CostRule = UNMEASURED
    config: XcclConfig = CONFIG
    pod: str = field(default_factory=lambda: f"relay{uuid.uuid4().hex[:10]}")
    segments: dict[Rank, Segment] = field(default_factory=dict)
    tables: dict[Rank, AddressTable] = field(default_factory=dict)
    attention: list[RoutedAttention] = field(default_factory=list)
    experts: list[RoutedExpert] = field(default_factory=list)

    def __enter__(self) -> RelayWorld:
        self.attention = [self.open_attention(i, 1) for i in range(self.shape.num_attention_ranks)]
        self.experts = [self.open_expert(i, 1) for i in range(self.shape.num_expert_ranks)]
        return self

    def _open(self, rank: Rank, incarnation: int) -> tuple[Segment, AddressTable]:
        attention = rank.service == "attention"
        layout = self.shape.attention_layout() if attention else self.shape.expert_layout()
        name = segment_name(self.pod, rank.service, rank.index, incarnation)
        segment = Segment.create(
            name, layout, service=rank.service, index=rank.index, incarnation=incarnation
        )
        if rank in self.segments:
            self.end(rank)
        self.segments[rank] = segment
        table = AddressTable()
        for other, their in self.segments.items():
            table.learn(other, their.incarnation, their.name)
        for other in self.tables.values():
            other.learn(rank, incarnation, name)
        self.tables[rank] = table
        return segment, table

    def open_attention(self, index: int, incarnation: int) -> RoutedAttention:
        segment, table = self._open(Rank("attention", index), incarnation)
        return RoutedAttention(segment, self.shape, index, table, config=self.config, rule=self.rule)

    def open_expert(self, index: int, incarnation: int) -> RoutedExpert:
        segment, table = self._open(Rank("expert", index), incarnation)
        return RoutedExpert(segment, self.shape, index, table, config=self.config)

    def end(self, rank: Rank) -> None:
        """The process of `rank` ends."""
        segment = self.segments[rank]
        segment.close()
        segment.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for side in (*self.attention, *self.experts):
            side.close()
        for table in self.tables.values():
            table.close()
        for rank in self.segments:
            self.end(rank)

    def serve(self, ranks: Iterable[int]) -> list[Arrival | Int8Arrival]:
        """Poll the expert ranks once, in this order; do and commit their work."""
        done: list[Arrival | Int8Arrival] = []
        for rank in ranks:
            side = self.experts[rank]
            poll = side.poll_int8 if self.shape.deliver_int8 else side.poll
            for arrival in poll(raise_error):
                work(arrival)
                side.commit(arrival)
                done.append(arrival)
        return done

    def serve_all(self, rng: np.random.Generator) -> None:
        """Poll in random orders until every exchange has gone all its hops."""
        for _ in range(4):
            self.serve(rng.permutation(self.shape.num_expert_ranks).tolist())

    def receive(self, side: RoutedAttention, handle: RoutedHandle) -> np.ndarray:
        """Return what the exchange yields; zeros where there is no expert."""
        out = np.zeros((handle.num_rows, self.shape.num_slots, self.shape.hidden), np.float32)
        side.e2a_recv(handle, out, Deadline.after_ms(40))
        return out


def work(arrival: Arrival | Int8Arrival) -> None:
    """What the experts do."""
    for i, (row, expert) in enumerate(zip(arrival.pair_row, arrival.pair_expert, strict=True)):
        if isinstance(arrival, Int8Arrival):
            part = slice(row, row + 1)
            assert arrival.pair_scale[i] == arrival.x_scale[row] or np.isnan(arrival.x_scale[row])
            y = int8_product(int(expert), arrival.x[part], arrival.x_scale[part])
            arrival.y[i : i + 1], arrival.y_scale[i : i + 1] = y
        else:
            arrival.y[i] = expert_product(int(expert), arrival.x[row])


def routing(
    rng: np.random.Generator, shape: RelayShape, num_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random rows, expert ranks (some -1) and expert ids."""
    x = rng.standard_normal((num_rows, shape.hidden)).astype(np.float32)
    expert = rng.integers(0, 3 * shape.num_expert_ranks, (num_rows, shape.num_slots)).astype(np.int32)
    none = rng.random(expert.shape) < 0.15
    return x, np.where(none, -1, expert % shape.num_expert_ranks).astype(np.int32), expert


@dataclass
class SourceBlock:
    """Views of an attention rank's source block."""

    starts: np.ndarray
    pair_row: np.ndarray
    pair_expert: np.ndarray


def source_block(shape: RelayShape, segment: Segment, microbatch: int = 0) -> SourceBlock:
    """What the attention rank that owns `segment` has staged."""
    geometry, pairs = shape.geometry(0), (shape.pairs_max,)
    at = segment.layout.managed_offset + shape.attention_source(microbatch)
    starts, pair_row, pair_expert = geometry[13:16]
    return SourceBlock(
        segment.array(at + starts, (shape.num_expert_ranks + 1,), np.int32),
        segment.array(at + pair_row, pairs, np.int32),
        segment.array(at + pair_expert, pairs, np.int32),
    )
