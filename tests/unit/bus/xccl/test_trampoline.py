"""Trampolines in one process: metadata writes are counted, deaths are named, impossible words are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import PeerDied, PeerStalled, SegmentCorrupt, Truncated
from bus.memory import _native
from bus.xccl.cost import CostRule, Route, RouteCost
from bus.xccl.endpoint import Rank, stamp
from bus.xccl.event import Event
from bus.xccl.reference import exchange, exchange_int8
from bus.xccl.relay_layout import CellKind, CellPlace, RelayShape
from tests.harness.dispatch_world import expert_product, int8_product
from tests.harness.relay_world import RelayWorld, raise_error, routing, source_block, work

SHAPE = RelayShape(
    num_attention_ranks=4, num_expert_ranks=6, rows_max=8, num_slots=3, hidden=5, num_domains=2
)
TRAMPOLINE = Route.TRAMPOLINE


@pytest.fixture
def world() -> Iterator[RelayWorld]:
    with RelayWorld(SHAPE) as world:
        yield world


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def soon() -> Deadline:
    return Deadline.after_ms(5_000)


def out_of(x: np.ndarray) -> np.ndarray:
    return np.zeros((x.shape[0], SHAPE.num_slots, SHAPE.hidden), np.float32)


@pytest.mark.parametrize("int8", [{}, {"int8": True, "deliver_int8": True}])
def test_the_form_that_the_shape_does_not_say_is_refused(int8: dict[str, bool]) -> None:
    with RelayWorld(replace(SHAPE, **int8)) as world:
        side = world.experts[0]
        with pytest.raises(ValueError, match="deliver_int8"):
            (side.poll if int8 else side.poll_int8)(raise_error)
    with pytest.raises(ValueError, match="deliver_int8: True needs int8=True"):
        replace(SHAPE, deliver_int8=True)


@pytest.mark.parametrize("route", Route)
def test_expert_ranks_that_widen_and_such_that_do_not_serve_one_exchange(
    route: Route, rng: np.random.Generator
) -> None:
    widening = replace(SHAPE, int8=True)
    with RelayWorld(replace(widening, deliver_int8=True)) as world:
        world.shape = widening
        world.experts[0].close()
        world.experts[0] = world.open_expert(0, 2)
        x, rank, expert = routing(rng, SHAPE, 8)
        handle = world.attention[1].a2e_send(x, rank, expert, Event(1, 0), route)
        for _ in range(4):
            for side in world.experts:
                for arrival in (
                    side.poll(raise_error) if side is world.experts[0] else side.poll_int8(raise_error)
                ):
                    work(arrival)
                    side.commit(arrival)
        wide = exchange(x, rank, expert, expert_product, int8=True)
        narrow = exchange_int8(x, rank, expert, int8_product)
        expected = np.where((rank == 0)[..., None], wide, narrow)
        assert world.receive(world.attention[1], handle).tobytes() == expected.tobytes()


@pytest.mark.parametrize("route", Route)
def test_rows_so_wide_that_the_interpreter_goes_on_meanwhile(route: Route, rng: np.random.Generator) -> None:
    shape = replace(SHAPE, hidden=2048)
    with RelayWorld(shape) as world:
        x, rank, expert = routing(rng, shape, shape.rows_max)
        assert x.nbytes >= 16_384
        handle = world.attention[1].a2e_send(x, rank, expert, Event(1, 0), route)
        world.serve_all(rng)
        out = world.receive(world.attention[1], handle)
        assert np.array_equal(out, exchange(x, rank, expert, expert_product))


def test_one_metadata_write_replaces_one_per_expert_rank(world: RelayWorld, rng: np.random.Generator) -> None:
    x, _, expert = routing(rng, SHAPE, 8)
    rank = expert % 6
    assert len(np.unique(rank)) == 6
    side = world.attention[3]
    side.a2e_send(x, rank, expert, Event(1, 0), Route.DIRECT)
    assert side.stats()["a2e_cell_writes"] == 6
    handle = side.a2e_send(x, rank, expert, Event(2, 0), TRAMPOLINE)
    assert side.stats()["a2e_cell_writes"] == 7
    world.serve_all(rng)
    assert np.array_equal(world.receive(side, handle), exchange(x, rank, expert, expert_product))
    trampoline = world.experts[SHAPE.trampoline_of(3)].stats()
    assert (trampoline["a2e_forward_cell_writes"], trampoline["relays_open"]) == (6, 0)
    assert sum(e.stats()["e2a_forward_cell_writes"] for e in world.experts) == 6


def test_the_rule_picks_the_way(rng: np.random.Generator) -> None:
    rule = CostRule(RouteCost(0, 10, 0), RouteCost(25, 0, 0))
    with RelayWorld(SHAPE, rule) as world:
        side = world.attention[0]
        x = np.ones((1, 5), np.float32)
        few, many = np.array([[0, 0, 1]], np.int32), np.array([[0, 1, 2]], np.int32)
        assert side.a2e_send(x, few, few, Event(1, 0)).route is Route.DIRECT
        assert side.a2e_send(x, many, many, Event(2, 0)).route is TRAMPOLINE


def test_domains_share_trampolines_at_seats_of_their_own() -> None:
    shape = RelayShape(
        num_attention_ranks=480, num_expert_ranks=288, rows_max=1, num_slots=1, hidden=1, num_domains=3
    )
    places = {(shape.trampoline_of(i), shape.seat_of(i)) for i in range(480)}
    assert len(places) == 480 and {t for t, _ in places} == set(range(160)) and shape.num_seats == 3
    assert all(shape.guest(shape.trampoline_of(i), shape.seat_of(i)) == i for i in range(480))
    assert shape.guest(200, 0) == 480, "an expert rank that is nobody's trampoline"


@pytest.mark.parametrize(("attention", "experts", "domains"), [(7, 3, 1), (7, 3, 2), (1, 1, 1), (5, 8, 5)])
def test_places_and_cells_are_distinct_and_invert(attention: int, experts: int, domains: int) -> None:
    shape = RelayShape(
        num_attention_ranks=attention,
        num_expert_ranks=experts,
        rows_max=1,
        num_slots=1,
        hidden=1,
        num_microbatches=2,
        num_domains=domains,
    )
    assert len({(shape.trampoline_of(i), shape.seat_of(i)) for i in range(attention)}) == attention
    assert all(shape.guest(shape.trampoline_of(i), shape.seat_of(i)) == i for i in range(attention))
    num_cells = shape.expert_layout().num_cells
    places = [shape.locate(index) for index in range(num_cells)]
    assert [shape.expert_cell(place) for place in places] == list(range(num_cells))


def test_no_pairs_is_a_normal_exchange(world: RelayWorld) -> None:
    x, none = np.ones((2, 5), np.float32), np.full((2, 3), -1, np.int32)
    for step, route in enumerate(Route, 1):
        handle = world.attention[0].a2e_send(x, none, none, Event(step, 0), route)
        assert not world.receive(world.attention[0], handle).any()


def test_the_dead_trampoline_is_named_and_its_successor_serves_the_next_attempt(
    world: RelayWorld, rng: np.random.Generator
) -> None:
    x, rank, expert = routing(rng, SHAPE, 8)
    side, trampoline = world.attention[3], SHAPE.trampoline_of(3)
    handle = side.a2e_send(x, rank, expert, Event(1, 0), TRAMPOLINE)
    world.serve([trampoline])
    world.segments[Rank("expert", trampoline)].close()
    with pytest.raises(PeerDied, match=f"peer expert-{trampoline},"):
        side.e2a_recv(handle, out_of(x), soon())
    world.experts[trampoline] = world.open_expert(trampoline, 2)
    handle = side.a2e_send(x, rank, expert, Event(1, 0, attempt=2), TRAMPOLINE)
    world.serve_all(rng)
    assert np.array_equal(world.receive(side, handle), exchange(x, rank, expert, expert_product))


def test_the_trampoline_names_a_dead_owner(world: RelayWorld, rng: np.random.Generator) -> None:
    x, _, expert = routing(rng, SHAPE, 8)
    side, trampoline = world.attention[3], SHAPE.trampoline_of(3)
    handle = side.a2e_send(x, expert % 6, expert, Event(1, 0), TRAMPOLINE)
    world.serve([trampoline, 0, 1, 2, 3, 5])
    world.segments[Rank("expert", 4)].close()
    deadline = soon()
    reports = world.experts[trampoline].stats()["e2a_cell_writes"]
    while world.experts[trampoline].stats()["e2a_cell_writes"] == reports and not deadline.expired():
        world.serve([trampoline])
    with pytest.raises(PeerDied, match=rf"says expert-{trampoline} .* peer expert-4,"):
        side.e2a_recv(handle, out_of(x), soon())


def test_an_owner_without_address_is_named(world: RelayWorld, rng: np.random.Generator) -> None:
    x, _, expert = routing(rng, SHAPE, 8)
    side, trampoline = world.attention[0], SHAPE.trampoline_of(0)
    world.tables[Rank("expert", trampoline)]._addresses.pop(Rank("expert", 4))
    handle = side.a2e_send(x, expert % 6, expert, Event(1, 0), TRAMPOLINE)
    world.serve([trampoline])
    with pytest.raises(PeerDied, match="peer expert-4,"):
        side.e2a_recv(handle, out_of(x), soon())


@pytest.mark.parametrize("route", list(Route))
def test_the_silent_are_named(world: RelayWorld, rng: np.random.Generator, route: Route) -> None:
    x, _, expert = routing(rng, SHAPE, 8)
    handle = world.attention[3].a2e_send(x, expert % 6, expert, Event(1, 0), route)
    silent = {
        Route.DIRECT: "peer expert-0,expert-1,expert-2,expert-3,expert-4,expert-5,",
        TRAMPOLINE: "peer expert-1,",
    }
    with pytest.raises(PeerStalled, match=silent[route]):
        world.receive(world.attention[3], handle)


@pytest.mark.parametrize("route", list(Route))
def test_late_answers_to_an_abandoned_attempt_are_dropped(
    world: RelayWorld, rng: np.random.Generator, route: Route
) -> None:
    x, rank, expert = routing(rng, SHAPE, 8)
    side = world.attention[3]
    side.a2e_send(x, rank, expert, Event(1, 0), route)
    world.serve([SHAPE.trampoline_of(3)])
    late = [(r, e.poll(raise_error)) for r, e in enumerate(world.experts)]
    handle = side.a2e_send(x, rank, expert, Event(1, 0, attempt=2), route)
    for r, arrivals in late:
        for arrival in arrivals:
            arrival.y[:] = np.nan
            world.experts[r].commit(arrival)
    world.serve_all(rng)
    assert np.array_equal(world.receive(side, handle), exchange(x, rank, expert, expert_product))


@pytest.mark.parametrize("route", list(Route))
def test_the_next_incarnation_of_an_attention_rank_may_use_the_same_event_ids(
    world: RelayWorld, rng: np.random.Generator, route: Route
) -> None:
    x, rank, expert = routing(rng, SHAPE, 8)
    world.attention[3].a2e_send(x, rank, expert, Event(1, 0), route)
    world.serve([SHAPE.trampoline_of(3)])
    arrivals = [(r, e.poll(raise_error)) for r, e in enumerate(world.experts)]
    successor = world.open_attention(3, 2)
    handle = successor.a2e_send(2 * x, rank, expert, Event(1, 0), route)
    for r, mine in arrivals:
        for arrival in mine:
            work(arrival)
            world.experts[r].commit(arrival)
    world.serve_all(rng)
    assert np.array_equal(world.receive(successor, handle), exchange(2 * x, rank, expert, expert_product))


def test_a_message_of_an_incarnation_that_is_not_yet_known_waits_for_its_address(
    world: RelayWorld, rng: np.random.Generator
) -> None:
    x, rank, expert = routing(rng, SHAPE, 4)
    address = world.tables[Rank("expert", 1)]._addresses.pop(Rank("attention", 3))
    handle = world.attention[3].a2e_send(x, rank, expert, Event(1, 0), TRAMPOLINE)
    world.serve_all(rng)
    world.tables[Rank("expert", 1)].learn(Rank("attention", 3), 1, address.segment)
    world.serve_all(rng)
    assert np.array_equal(
        world.receive(world.attention[3], handle), exchange(x, rank, expert, expert_product)
    )


def forge(world: RelayWorld, place: CellPlace, w2: int, w3: int, expert: int) -> list[SegmentCorrupt]:
    segment = world.segments[Rank("expert", expert)]
    cell = segment.cell_offset(SHAPE.expert_cell(place))
    _native.write_cell(segment.buf, cell, stamp(1, 500), Event(1, 0).pack(), w2, w3)
    segment.ring_doorbell()
    errors: list[SegmentCorrupt] = []
    assert world.experts[expert].poll(errors.append) == []
    return errors


@pytest.mark.parametrize("kind", [CellKind.DIRECT, CellKind.FORWARD, CellKind.ENTRY])
@pytest.mark.parametrize(
    ("w2", "w3"), [(1 << 40, 1), (25, 1), (1, 9), (20 << 32 | 5, 8), ((1 << 64) - 1, (1 << 64) - 1)]
)
def test_counts_outside_the_shape_are_reported(world: RelayWorld, kind: CellKind, w2: int, w3: int) -> None:
    peer = 0 if kind is CellKind.ENTRY else 1
    errors = forge(world, CellPlace(kind, peer, 0, 0), w2, w3, expert=1)
    assert len(errors) == 1 and "num_pairs" in str(errors[0])


def test_rows_and_starts_outside_the_shape_are_reported(world: RelayWorld, rng: np.random.Generator) -> None:
    x, _, expert = routing(rng, SHAPE, 8)
    side, sender = world.attention[3], world.segments[Rank("attention", 3)]
    for route in Route:
        side.a2e_send(x, expert % 6, expert, Event(1, 0), route)
        source = source_block(SHAPE, sender)
        source.pair_row[:] = 8
        source.starts[2] = -5
        errors: list[SegmentCorrupt] = []
        for rank in world.experts:
            assert rank.poll(errors.append) == []
        assert errors and all(e.peer == "attention-3" for e in errors)


def test_a_seat_of_nobody_is_reported() -> None:
    shape = RelayShape(num_attention_ranks=1, num_expert_ranks=2, rows_max=1, num_slots=1, hidden=1)
    with RelayWorld(shape) as world:
        segment = world.segments[Rank("expert", 1)]
        cell = segment.cell_offset(shape.expert_cell(CellPlace(CellKind.ENTRY, 0, 0, 0)))
        _native.write_cell(segment.buf, cell, stamp(1, 1), Event(1, 0).pack(), 1, 1)
        errors: list[SegmentCorrupt] = []
        assert world.experts[1].poll(errors.append) == [] and "nobody" in str(errors[0])


def test_bad_input_is_refused(world: RelayWorld) -> None:
    side, event = world.attention[0], Event(1, 0)
    x, slots = np.zeros((9, 5), np.float32), np.zeros((9, 3), np.int32)
    with pytest.raises(Truncated, match="rows_max=8"):
        side.a2e_send(x, slots, slots, event)
    with pytest.raises(ValueError, match="must be"):
        side.a2e_send(x[:8], slots, slots, event)
    with pytest.raises(ValueError, match="slot_rank"):
        side.a2e_send(x[:8], slots[:8] + 6, slots[:8], event)
    with pytest.raises(ValueError, match="microbatch"):
        side.a2e_send(x[:8], slots[:8], slots[:8], Event(1, 0, 1))
    handle = side.a2e_send(x[:8], slots[:8], slots[:8], event)
    with pytest.raises(ValueError, match="out: "):
        side.try_recv(handle, np.zeros((8, 3, 4), np.float32))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("route", list(Route))
def test_combining_in_place_equals_adding_the_slots_in_order(
    rng: np.random.Generator, route: Route, int8: bool
) -> None:
    shape = RelayShape(
        num_attention_ranks=2, num_expert_ranks=3, rows_max=4, num_slots=3, hidden=70, int8=int8
    )
    with RelayWorld(shape) as world:
        x, rank, expert = routing(rng, shape, 4)
        weights = rng.random((4, 3), np.float32)
        handle = world.attention[1].a2e_send(x, rank, expert, Event(1, 0), route)
        world.serve_all(rng)
        out = np.full((4, 70), np.nan, np.float32)
        world.attention[1].e2a_combine(handle, weights, out, soon())
    slots, wanted = exchange(x, rank, expert, expert_product, int8=int8), np.zeros((4, 70), np.float32)
    for slot in range(3):
        wanted += np.where(rank[:, slot, None] >= 0, weights[:, slot, None] * slots[:, slot], np.float32(0))
    assert out.tobytes() == wanted.tobytes()


def test_a_handle_is_used_up_and_void_after_the_next_send(
    world: RelayWorld, rng: np.random.Generator
) -> None:
    x, rank, expert = routing(rng, SHAPE, 4)
    side = world.attention[0]
    old = side.a2e_send(x, rank, expert, Event(1, 0))
    handle = side.a2e_send(x, rank, expert, Event(2, 0))
    world.serve_all(rng)
    with pytest.raises(ValueError, match="handle"):
        side.try_recv(old, out_of(x))
    assert side.try_recv(handle, out_of(x))
    with pytest.raises(ValueError, match="handle"):
        side.try_recv(handle, out_of(x))


def test_a_late_commit_does_not_cover_the_answer_to_the_next_attempt(
    world: RelayWorld, rng: np.random.Generator
) -> None:
    x, rank = np.ones((1, 5), np.float32), np.zeros((1, 3), np.int32)
    side, expert = world.attention[0], world.experts[0]
    side.a2e_send(x, rank, rank, Event(1, 0))
    (late,) = expert.poll(raise_error)
    handle = side.a2e_send(x, rank, rank, Event(1, 0, attempt=2))
    world.serve([0])
    assert not expert.commit(late)
    assert side.try_recv(handle, out_of(x))


def test_attempts_that_come_both_ways_are_served_once(world: RelayWorld, rng: np.random.Generator) -> None:
    x, _, expert = routing(rng, SHAPE, 8)
    rank = (expert % 6).astype(np.int32)
    side = world.attention[3]
    side.a2e_send(x, rank, expert, Event(1, 0, attempt=1), Route.DIRECT)
    handle = side.a2e_send(2 * x, rank, expert, Event(1, 0, attempt=2), TRAMPOLINE)
    trampoline = SHAPE.trampoline_of(3)
    forwarded = world.experts[trampoline].poll(
        raise_error
    )  # it has told the owners, who have seen neither attempt
    other = next(r for r in range(6) if r != trampoline)
    assert [a.event.attempt for a in world.experts[other].poll(raise_error)] == [2]
    assert [a.event.attempt for a in forwarded] == [1]
    handle = side.a2e_send(2 * x, rank, expert, Event(1, 0, attempt=3), TRAMPOLINE)
    world.serve_all(rng)
    assert np.array_equal(world.receive(side, handle), exchange(2 * x, rank, expert, expert_product))
