"""Dispatch/combine equals its slow twin bit for bit, whatever the routing; INT8 equals the twin's INT8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.clock import Deadline
from bus.xccl import int8, reference
from bus.xccl.alltoall import AllToAllShape
from bus.xccl.cost import Route
from bus.xccl.dispatch import DispatchShape
from bus.xccl.event import Event
from bus.xccl.relay_layout import RelayShape
from tests.harness.alltoall_world import AllToAllWorld
from tests.harness.dispatch_world import DispatchWorld, expert_product, int8_product
from tests.harness.relay_world import RelayWorld, routing

MAX_TOKENS = 6

shapes = st.builds(
    DispatchShape,
    num_ranks=st.integers(1, 5),
    max_tokens=st.just(MAX_TOKENS),
    top_k=st.integers(1, 4),
    hidden=st.sampled_from([1, 5, 16, 64, 65, 130]),
    num_local_experts=st.integers(1, 3),
    num_microbatches=st.integers(1, 2),
    int8=st.booleans(),
    in_place=st.booleans(),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes, data=st.data())
def test_dispatch_and_combine_equal_the_twin(shape: DispatchShape, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    with DispatchWorld(shape) as world:
        for step in range(1, 4):
            tokens = data.draw(
                st.lists(st.integers(0, MAX_TOKENS), min_size=shape.num_ranks, max_size=shape.num_ranks)
            )
            inputs = world.routed(rng, tokens, none_share=data.draw(st.sampled_from([0.0, 0.3, 1.0])))
            event = Event(step=step, layer=0, microbatch=step % shape.num_microbatches)
            results = world.exchange(inputs, event)
            xs, idx = [i.x for i in inputs], [i.topk_idx for i in inputs]
            received = reference.dispatch_rows(xs, idx, shape.num_local_experts, int8=shape.int8)
            outs = reference.dispatch_combine(
                xs, idx, [i.weights for i in inputs], expert_product, int8=shape.int8
            )
            for (result, out), (x, counts), expected in zip(results, received, outs, strict=True):
                assert np.array_equal(result.expert_counts, counts)
                assert result.x.tobytes() == x.tobytes()
                assert out.tobytes() == expected.tobytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes.map(lambda shape: replace(shape, int8=True, deliver_int8=True)), data=st.data())
def test_int8_rows_arrive_and_are_added_as_they_are(shape: DispatchShape, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    with DispatchWorld(shape) as world:
        for step in range(1, 4):
            tokens = rng.integers(0, MAX_TOKENS + 1, shape.num_ranks).tolist()
            inputs = world.routed(rng, tokens, none_share=data.draw(st.sampled_from([0.0, 0.3, 1.0])))
            event = Event(step=step, layer=0, microbatch=step % shape.num_microbatches)
            results = world.exchange_int8(inputs, event)
            xs, idx = [i.x for i in inputs], [i.topk_idx for i in inputs]
            received = reference.dispatch_rows_int8(xs, idx, shape.num_local_experts)
            outs = reference.dispatch_combine_int8(xs, idx, [i.weights for i in inputs], int8_product)
            for (result, out), (x, scale, counts), expected in zip(results, received, outs, strict=True):
                assert np.array_equal(result.expert_counts, counts)
                assert result.x.tobytes() == x.tobytes()
                assert result.x_scale.tobytes() == scale.tobytes()
                assert out.tobytes() == expected.tobytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(num_ranks=st.integers(1, 5), data=st.data())
def test_a_plain_all_to_all_equals_the_twin(num_ranks: int, data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(["u1", "i2", "f4", "c16"])))
    width = data.draw(st.sampled_from([1, 3, 64]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shape = AllToAllShape(num_ranks=num_ranks, stage_bytes=1 << 16, area_bytes=1 << 16)
    with AllToAllWorld(shape) as world:
        for step in range(1, 5):
            counts = [rng.integers(0, 6, num_ranks) for _ in range(num_ranks)]
            arrays = [rng.integers(0, 255, (int(c.sum()), width)).astype(dtype) for c in counts]
            expected = reference.all_to_all(arrays, counts)
            for rank in range(num_ranks):
                if data.draw(st.booleans()):  # straight from the app area
                    there = world.ranks[rank].area(arrays[rank].shape, dtype)
                    there[:] = arrays[rank]
                    arrays[rank] = there

            has_out = data.draw(st.booleans())

            def one(rank: int) -> Any:
                array, event = arrays[rank], Event(step, 0)  # noqa: B023
                out = np.empty((5 * num_ranks + 1, width), dtype) if has_out else None  # noqa: B023
                return world.ranks[rank].exchange(
                    array,
                    counts[rank],  # noqa: B023
                    event=event,
                    deadline=Deadline.after_ms(20_000),
                    out=out,
                )

            for (rows, came), (twin_rows, twin_came) in zip(world.each(one), expected, strict=True):
                assert rows.dtype == dtype and rows.tobytes() == twin_rows.tobytes()
                assert np.array_equal(came, twin_came)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(rows=st.integers(0, 3), hidden=st.integers(1, 70), data=st.data())
def test_int8_equals_the_twin(rows: int, hidden: int, data: st.DataObject) -> None:
    values: Any = data.draw(st.lists(finite, min_size=rows * hidden, max_size=rows * hidden))
    x = np.array(values, np.float32).reshape(rows, hidden)
    q, scale = int8.quantise(x)
    twin_q, twin_scale = reference.quantise_rows(x)
    assert np.array_equal(q, twin_q) and scale.tobytes() == twin_scale.tobytes()
    assert int8.dequantise(q, scale).tobytes() == reference.transport(x, int8=True).tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_comes_out_as_nan_and_leaves_its_neighbours_alone(bad: float) -> None:
    x = np.ones((3, 70), np.float32)
    x[1, 69] = bad
    out = int8.dequantise(*int8.quantise(x))
    assert np.isnan(out[1]).all() and (out[[0, 2]] == 1).all()


def test_rounding_is_half_to_even() -> None:
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]], np.float32)
    q, scale = int8.quantise(x)
    assert scale[0] == 1.0 and q.tolist() == [[127, 0, 2, 2, 0, -2, 126]]


relay_shapes = st.builds(
    RelayShape,
    num_attention_ranks=st.integers(2, 5),
    num_expert_ranks=st.integers(1, 4),
    rows_max=st.just(5),
    num_slots=st.integers(1, 4),
    hidden=st.sampled_from([1, 7, 64]),
    num_microbatches=st.just(2),
    num_domains=st.integers(1, 2),
)
KINDS = [{}, {"int8": True}, {"int8": True, "deliver_int8": True}]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=relay_shapes, kind=st.sampled_from(KINDS), data=st.data())
def test_a2e_and_e2a_equal_the_twin_on_either_way(
    shape: RelayShape, kind: dict[str, bool], data: st.DataObject
) -> None:
    shape = replace(shape, **kind)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    with RelayWorld(shape) as world:
        for step in range(1, 3):
            pending = []
            for side in world.attention:
                for microbatch in range(2):
                    x, rank, expert = routing(rng, shape, data.draw(st.integers(0, shape.rows_max)))
                    route = data.draw(st.sampled_from(list(Route)))
                    handle = side.a2e_send(x, rank, expert, Event(step, 3, microbatch), route)
                    pending.append((side, handle, x, rank, expert))
            world.serve_all(rng)
            for side, handle, x, rank, expert in pending:
                if shape.deliver_int8:
                    expected = reference.exchange_int8(x, rank, expert, int8_product)
                else:
                    expected = reference.exchange(x, rank, expert, expert_product, int8=shape.int8)
                assert world.receive(side, handle).tobytes() == expected.tobytes()
        assert not any(e.stats()["dropped"] for e in world.experts)
