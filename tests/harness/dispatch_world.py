"""A group of dispatch/combine ranks in one process; what they route to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bus.clock import Deadline
from bus.xccl.dispatch import Dispatcher
from bus.xccl.dispatch_layout import DispatchResult, DispatchShape, Int8DispatchResult
from bus.xccl.event import Event
from tests.harness.group_world import GroupWorld

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int8Array = npt.NDArray[np.int8]


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


def int8_product(expert: int, q: Int8Array, scale: Float32Array) -> tuple[Int8Array, Float32Array]:
    """A stand-in for an INT8 expert: its rows are reversed, so that it shows when a row and a scale part company."""
    return q[:, ::-1], scale * np.float32(expert + 1) / np.float32(3)


def fill_int8(result: Int8DispatchResult, rank: int, num_local: int) -> None:
    """Do the experts' work on a result of `dispatch_int8`."""
    begin = 0
    for local, count in enumerate(result.expert_counts):
        part = slice(begin, begin + int(count))
        result.y[part], result.y_scale[part] = int8_product(
            rank * num_local + local, result.x[part], result.x_scale[part]
        )
        begin += int(count)


@dataclass
class Routed:
    """One rank's input."""

    x: Float32Array
    topk_idx: Int32Array
    weights: Float32Array


class DispatchWorld(GroupWorld[DispatchShape, Dispatcher]):
    """All ranks of a group."""

    def open(self, index: int) -> Dispatcher:
        return Dispatcher(self.segments[index], self.shape, index, self.tables[index], config=self.config)

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

    def exchange_int8(
        self, inputs: Sequence[Routed], event: Event
    ) -> list[tuple[Int8DispatchResult, Float32Array]]:
        """The same with rows that are delivered as INT8."""
        return self.each(lambda r: self.one_int8(r, inputs[r], event))

    def one_int8(self, rank: int, routed: Routed, event: Event) -> tuple[Int8DispatchResult, Float32Array]:
        deadline = Deadline.after_ms(20_000)
        side = self.ranks[rank]
        result, handle = side.dispatch_int8(routed.x, routed.topk_idx, event=event, deadline=deadline)
        x, x_scale = result.x.copy(), result.x_scale.copy()
        seen = Int8DispatchResult(x, x_scale, result.expert_counts.copy(), result.y, result.y_scale)
        fill_int8(result, rank, self.shape.num_local_experts)
        out = side.combine(result.y, routed.weights, handle, deadline=deadline)
        return seen, out
