"""A group of dispatch/combine ranks in one process, a thread for each while they exchange."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.memory.segment import Segment, segment_name
from bus.xccl.dispatch import Dispatcher, DispatchResult, DispatchShape
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
T = TypeVar("T")


def expert_product(expert: int, rows: Float32Array) -> Float32Array:
    """A stand-in for an expert whose output says who made it."""
    return (rows * np.float32(expert + 1) + np.float32(expert) / np.float32(3)).astype(np.float32)


def fill(result: DispatchResult, rank: int, num_local: int) -> None:
    """Do the experts' work on a dispatch's result."""
    begin = 0
    for local, count in enumerate(result.expert_counts):
        result.y[begin : begin + count] = expert_product(
            rank * num_local + local, result.x[begin : begin + count]
        )
        begin += int(count)


@dataclass
class Routed:
    """One rank's input."""

    x: Float32Array
    topk_idx: Int32Array
    weights: Float32Array


@dataclass
class DispatchWorld:
    """All ranks of a group."""

    shape: DispatchShape
    pod: str = field(default_factory=lambda: f"disp{uuid.uuid4().hex[:10]}")
    segments: list[Segment] = field(default_factory=list)
    tables: list[AddressTable] = field(default_factory=list)
    ranks: list[Dispatcher] = field(default_factory=list)

    def __enter__(self) -> DispatchWorld:
        for index in range(self.shape.num_ranks):
            self.segments.append(self.create_segment(index, 1))
        for index in range(self.shape.num_ranks):
            self.tables.append(AddressTable())
            for peer, segment in enumerate(self.segments):
                self.tables[index].learn(Rank("expert", peer), 1, segment.name)
            self.ranks.append(self.dispatcher(index))
        self.pool = ThreadPoolExecutor(self.shape.num_ranks)
        return self

    def create_segment(self, index: int, incarnation: int) -> Segment:
        name = segment_name(self.pod, "expert", index, incarnation)
        return Segment.create(
            name, self.shape.layout(), service="expert", index=index, incarnation=incarnation
        )

    def dispatcher(self, index: int) -> Dispatcher:
        config = XcclConfig(spin_us=0, poll_interval_ms=5)
        return Dispatcher(self.segments[index], self.shape, index, self.tables[index], config=config)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown()
        for rank in self.ranks:
            rank.close()
        for table in self.tables:
            table.close()
        for segment in self.segments:
            segment.close()
            segment.unlink()

    def routed(
        self, rng: np.random.Generator, tokens: Sequence[int], *, none_share: float = 0.2
    ) -> list[Routed]:
        """Random inputs, with `tokens[r]` rows for rank r."""
        shape, inputs = self.shape, []
        for num in tokens:
            x = rng.standard_normal((num, shape.hidden)).astype(np.float32)
            idx = rng.integers(0, shape.num_experts, (num, shape.top_k)).astype(np.int32)
            idx[rng.random(idx.shape) < none_share] = -1
            inputs.append(Routed(x, idx, rng.random(idx.shape, np.float32)))
        return inputs

    def exchange(self, inputs: Sequence[Routed], event: Event) -> list[tuple[DispatchResult, Float32Array]]:
        """Run dispatch, experts and combine on all ranks at once."""
        return self.each(lambda r: self.one(r, inputs[r], event))

    def one(self, rank: int, routed: Routed, event: Event) -> tuple[DispatchResult, Float32Array]:
        deadline = Deadline.after_ms(20_000)
        side = self.ranks[rank]
        result, handle = side.dispatch(routed.x, routed.topk_idx, event=event, deadline=deadline)
        seen = DispatchResult(result.x.copy(), result.expert_counts.copy(), result.y)
        fill(result, rank, self.shape.num_local_experts)
        out = side.combine(result.y, routed.weights, handle, deadline=deadline)
        return seen, out

    def each(self, work: Callable[[int], T]) -> list[T]:
        """Run `work(rank)` for all ranks at once; raises the first error of the lowest rank."""
        futures = [self.pool.submit(work, rank) for rank in range(self.shape.num_ranks)]
        return [future.result(30) for future in futures]
