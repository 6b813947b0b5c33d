"""A2E/E2A in one process: the fast path equals its slow twin, and bad or late messages do no harm."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import PeerDied, PeerStalled, SegmentCorrupt, Truncated
from bus.memory import _native
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment, segment_name
from bus.xccl.a2e import A2EShape, Arrival, AttentionSide, ExpertSide
from bus.xccl.event import Event
from bus.xccl.reference import exchange

SHAPE = A2EShape(num_attention_ranks=2, num_expert_ranks=3, rows_max=8, num_slots=3, hidden=5)


def expert_product(expert: int, rows: np.ndarray) -> np.ndarray:
    """A stand-in for an expert whose output says who made it."""
    return (rows * np.float32(expert + 1) + np.float32(expert) / 3).astype(np.float32)


@dataclass
class World:
    attention: list[AttentionSide]
    experts: list[ExpertSide]
    segments: dict[str, Segment]
    pod: str

    def serve(self, *ranks: int) -> list[Arrival]:
        done = []
        for rank in ranks:
            for arrival in self.experts[rank].poll(raise_error):
                for i, (row, expert) in enumerate(zip(arrival.pair_row, arrival.pair_expert, strict=True)):
                    arrival.y[i] = expert_product(int(expert), arrival.x[row])
                self.experts[rank].commit(arrival)
                done.append(arrival)
        return done


def raise_error(error: SegmentCorrupt) -> None:
    raise error


def make_attention(world: World, index: int, incarnation: int) -> AttentionSide:
    name = segment_name(world.pod, "attention", index, incarnation)
    layout = SegmentLayout(SHAPE.attention_cells, SHAPE.attention_managed_bytes, 0)
    segment = Segment.create(name, layout, service="attention", index=index, incarnation=incarnation)
    world.segments[name] = segment
    side = AttentionSide(segment, SHAPE, index, spin_us=0, poll_interval_ms=5)
    for rank in range(SHAPE.num_expert_ranks):
        side.connect(rank, Segment.attach(segment_name(world.pod, "expert", rank, 1)))
    return side


@pytest.fixture
def world() -> Iterator[World]:
    world = World([], [], {}, f"t{uuid.uuid4().hex[:8]}")
    layout = SegmentLayout(SHAPE.expert_cells, SHAPE.expert_managed_bytes, 0)
    pattern = segment_name(world.pod, "attention", 0, 1).replace("-0-1", "-{index}-{incarnation}")
    for rank in range(SHAPE.num_expert_ranks):
        name = segment_name(world.pod, "expert", rank, 1)
        segment = Segment.create(name, layout, service="expert", index=rank, incarnation=1)
        world.segments[name] = segment
        world.experts.append(ExpertSide(segment, SHAPE, rank, pattern))
    world.attention = [make_attention(world, index, 1) for index in range(SHAPE.num_attention_ranks)]
    yield world
    for side in (*world.attention, *world.experts):
        side.close()
    for segment in world.segments.values():
        segment.close()
        segment.unlink()


def random_routing(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = rng.standard_normal((num_rows, SHAPE.hidden)).astype(np.float32)
    expert = rng.integers(0, 9, (num_rows, SHAPE.num_slots)).astype(np.int32)
    rank = np.where(rng.random(expert.shape) < 0.1, -1, expert % SHAPE.num_expert_ranks).astype(np.int32)
    return x, rank, expert


def soon() -> Deadline:
    return Deadline.after_ms(30)


@pytest.mark.parametrize("seed", range(20))
def test_exchange_equals_its_slow_twin_bit_for_bit(world: World, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pending = []
    for d, side in enumerate(world.attention):
        x, rank, expert = random_routing(rng, int(rng.integers(1, SHAPE.rows_max + 1)))
        handle = side.a2e_send(x, rank, expert, Event(step=seed + 1, layer=d))
        pending.append((side, handle, x, rank, expert))
    world.serve(*rng.permutation(SHAPE.num_expert_ranks))
    for side, handle, x, rank, expert in pending:
        out = np.zeros((x.shape[0], SHAPE.num_slots, SHAPE.hidden), np.float32)
        side.e2a_recv(handle, out, soon())
        assert np.array_equal(out, exchange(x, rank, expert, expert_product))


def test_a_rank_without_pairs_hears_nothing_and_is_not_awaited(world: World) -> None:
    x = np.ones((2, SHAPE.hidden), np.float32)
    rank = np.full((2, SHAPE.num_slots), 1, np.int32)
    handle = world.attention[0].a2e_send(x, rank, rank, Event(step=1, layer=0))
    assert handle.pending == {1}
    assert world.serve(0, 2) == []
    assert [a.peer for a in world.serve(1)] == [0]
    assert world.serve(1) == [], "an exchange is served once"


def test_a_late_answer_to_an_abandoned_attempt_is_not_read(world: World) -> None:
    x, rank, expert = random_routing(np.random.default_rng(1), 4)
    side = world.attention[0]
    side.a2e_send(x, rank, expert, Event(step=1, layer=0, attempt=1))
    late = [world.experts[r].poll(raise_error) for r in range(SHAPE.num_expert_ranks)]
    handle = side.a2e_send(x, rank, expert, Event(step=1, layer=0, attempt=2))
    for r, arrivals in enumerate(late):
        for arrival in arrivals:
            arrival.y[:] = np.nan
            world.experts[r].commit(arrival)
    out = np.zeros((4, SHAPE.num_slots, SHAPE.hidden), np.float32)
    with pytest.raises(PeerStalled, match="expert-"):
        side.e2a_recv(handle, out, soon())
    world.serve(0, 1, 2)
    side.e2a_recv(handle, out, soon())
    assert np.array_equal(out, exchange(x, rank, expert, expert_product))


def test_a_dead_rank_raises_and_its_next_incarnation_serves_the_next_attempt(world: World) -> None:
    x, rank, expert = random_routing(np.random.default_rng(2), 4)
    side = world.attention[0]
    handle = side.a2e_send(x, rank, expert, Event(step=1, layer=0))
    world.serve(0, 2)
    old = world.segments[segment_name(world.pod, "expert", 1, 1)]
    old.close()
    out = np.zeros((4, SHAPE.num_slots, SHAPE.hidden), np.float32)
    with pytest.raises(PeerDied, match="expert-1"):
        side.e2a_recv(handle, out, Deadline.after_ms(5000))
    assert side.incarnation_of(1) == 1 and not side.alive(1) and side.alive(0)
    name = segment_name(world.pod, "expert", 1, 2)
    fresh = Segment.create(name, old.layout, service="expert", index=1, incarnation=2)
    world.segments[name] = fresh
    world.experts[1].close()
    world.experts[1] = ExpertSide(fresh, SHAPE, 1, f"/xds-{world.pod}-attention-{{index}}-{{incarnation}}")
    side.connect(1, Segment.attach(name))
    handle = side.a2e_send(x, rank, expert, Event(step=1, layer=0, attempt=2))
    world.serve(0, 1, 2)
    side.e2a_recv(handle, out, soon())
    assert np.array_equal(out, exchange(x, rank, expert, expert_product))


def test_the_next_incarnation_of_an_attention_rank_may_use_the_same_event_ids(world: World) -> None:
    x, rank, expert = random_routing(np.random.default_rng(3), 4)
    event = Event(step=1, layer=0)
    world.attention[0].a2e_send(x, rank, expert, event)
    world.serve(0, 1, 2)
    successor = make_attention(world, 0, 2)
    handle = successor.a2e_send(x, rank, expert, event)
    assert world.serve(0, 1, 2)
    out = np.zeros((4, SHAPE.num_slots, SHAPE.hidden), np.float32)
    successor.e2a_recv(handle, out, soon())
    successor.close()
    assert np.array_equal(out, exchange(x, rank, expert, expert_product))


def test_more_rows_than_the_block_holds_are_refused(world: World) -> None:
    x = np.zeros((SHAPE.rows_max + 1, SHAPE.hidden), np.float32)
    slots = np.zeros((SHAPE.rows_max + 1, SHAPE.num_slots), np.int32)
    with pytest.raises(Truncated, match="rows_max=8"):
        world.attention[0].a2e_send(x, slots, slots, Event(step=1, layer=0))


@pytest.mark.parametrize(
    ("extent", "num_rows"), [(1 << 40, 1), (25, 1), (1, 9), (20 << 32 | 5, 8), ((1 << 64) - 1, (1 << 64) - 1)]
)
def test_counts_outside_the_shape_are_reported_and_dropped(world: World, extent: int, num_rows: int) -> None:
    segment = world.segments[segment_name(world.pod, "expert", 0, 1)]
    _native.write_cell(segment.buf, segment.cell_offset(0), Event(1, 0).pack(), extent, num_rows, 1)
    errors: list[SegmentCorrupt] = []
    assert world.experts[0].poll(errors.append) == []
    assert len(errors) == 1 and errors[0].peer == "attention-0"


def test_a_message_of_an_unknown_incarnation_is_dropped_and_counted(world: World) -> None:
    segment = world.segments[segment_name(world.pod, "expert", 0, 1)]
    _native.write_cell(segment.buf, segment.cell_offset(1), Event(1, 0).pack(), 1, 1, 77)
    assert world.experts[0].poll(raise_error) == []
    assert world.experts[0].num_dropped == 1
