"""What runs under ThreadSanitizer: both ends of each transport as threads of one process. `race_scenarios.py NAME POD`.

The sanitizer knows addresses, not pages, so the ends must share one mapping: `Segment.attach` gives the owner's own.
It does not see what Python's lock orders (race.py hides it); what one thread sets up and another uses passes a `Gate`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import race_memory

from bus.clock import NS_PER_S, Deadline
from bus.config import XcclConfig
from bus.memory import _native, shm
from bus.memory.layout import SegmentLayout
from bus.memory.ring import Consumer, Producer, RingLayout
from bus.memory.segment import Segment, segment_name
from bus.memory.wait import Blocking, Doorbell, WaitStrategy, Yielding, wait_until
from bus.xccl.endpoint import Endpoint, World
from bus.xccl.event import Event
from bus.xccl.p2p import P2p

POD = sys.argv[2]
WORLD = World.of(attention=1, expert=1)
SENDER, RECEIVER = WORLD.ranks
RING = RingLayout(num_slots=4, slot_bytes=256)
STEPS = 100  # exchanges of a group
SLEEPS, POLLS = XcclConfig(spin_us=0, poll_interval_ms=5), XcclConfig()

_create = Segment.create
_owned: dict[str, Segment] = {}


class SharedSegment(Segment):
    """A peer's segment in the process of its owner: the same mapping, another descriptor."""

    def __init__(self, owner: Segment) -> None:
        self._fd = shm.open_existing(owner.name)
        self.name, self.identity, self.layout = owner.name, owner.identity, owner.layout
        self.is_owner, self.buf = False, owner.buf

    def close(self) -> None:
        """Close the descriptor; the mapping is the owner's."""
        if not self.closed:
            shm.os.close(self._fd)
            self._fd = -1


def create(name: str, layout: SegmentLayout, **identity: object) -> Segment:
    """Create, remember, and say where it is mapped: race.py counts reports about these bytes."""
    segment = _owned[name] = _create(name, layout, **identity)  # type: ignore[arg-type]
    start = np.frombuffer(segment.buf, np.uint8).ctypes.data
    print(f"segment {start:#x} {segment.layout.total_bytes}", flush=True)
    return segment


def attach(name: str) -> Segment:
    return SharedSegment(_owned[name])


class Gate:
    """Orders what was done before `open` before what is done after `enter`, in the sanitizer's eyes too."""

    def __init__(self) -> None:
        self._word = bytearray(8)

    def open(self) -> None:
        _native.fetch_add_u64(self._word, 0, 1)

    def enter(self) -> None:
        _native.load_u64(self._word, 0)


def run_threads(*works: Callable[[], None]) -> None:
    """Run all at once; raises the first error."""
    gate, errors = Gate(), []

    def guarded(work: Callable[[], None]) -> None:
        gate.enter()
        race_memory.install()
        try:
            work()
        except BaseException as error:
            errors.append(error)
        gate.open()

    gate.open()
    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gate.enter()
    if errors:
        raise errors[0]


def soon() -> Deadline:
    return Deadline.after_ms(120_000)


@contextmanager
def two_ends(
    incarnation: int, config: XcclConfig, app_bytes: int, strategy: WaitStrategy | None = None
) -> Iterator[list[Endpoint]]:
    """The sender's and the receiver's end, each knowing the other."""
    ends = [
        Endpoint(pod=POD, world=WORLD, me=me, incarnation=incarnation, config=config, p2p_peers=[peer],
                 p2p_ring=RING, app_bytes=app_bytes, strategy=strategy)
        for me, peer in ((SENDER, RECEIVER), (RECEIVER, SENDER))
    ]  # fmt: skip
    for end in ends:
        for other in ends:
            end.learn(other.me, incarnation, other.segment.name)
    yield ends
    for end in ends:
        end.close()


def p2p() -> None:
    """Messages of one record, of many, and ones that are pulled from the sender's app area, under two ways to wait."""
    for incarnation, config in enumerate((POLLS, SLEEPS), 1):
        with two_ends(incarnation, config, 1 << 18) as ends:
            exchange_messages(*ends, [1, 200, 256, 1000, 5000, 1 << 17] * 100)


def lanes() -> None:
    """Arrays whose copy several threads share, out of the sender's app area; others, whose sender shares it."""
    with two_ends(1, XcclConfig(num_lanes=4), 1 << 20) as ends:
        assert exchange_messages(*ends, [1 << 20, 600_000] * 30, in_place=True) > 0, "no other lane has run"


def share() -> None:
    """Large arrays, which the sender writes into the app area of the receiver, who reads them, from their end on."""
    size, count = 1 << 18, 100
    with two_ends(1, POLLS, size, Yielding()) as (here, there):
        app = there.segment.layout.app_offset
        out, kept = there.segment.array(app, (size,), np.uint8), np.empty(size, np.uint8)

        def send() -> None:
            p2p = P2p(here)
            for event in range(count):
                p2p.send(np.full(size, event % 251, np.uint8), RECEIVER, event, soon())
            p2p.close()

        def receive() -> None:
            p2p = P2p(there)
            for event in range(count):
                p2p.recv(out, SENDER, event, soon())
                _native.copy(
                    kept, 0, out, 0, size
                )  # seen by the sanitizer: after `helped`, before the next invitation
                assert (kept == event % 251).all()
            assert p2p.stats()[SENDER, "recv"]["num_shared_bytes"] > 0, "the sender has not helped"
            p2p.close()

        run_threads(send, receive)


def exchange_messages(here: Endpoint, there: Endpoint, sizes: list[int], *, in_place: bool = False) -> int:
    """Every second message lies in the sender's app area; with `in_place` all are received into the receiver's.

    Returns how many blocks were copied by other lanes than the receiving thread.
    """
    num_lane_blocks = 0
    source, target = (
        end.segment.array(end.segment.layout.app_offset, (max(sizes),), np.uint8) for end in (here, there)
    )

    def send() -> None:
        p2p = P2p(here)
        for event, size in enumerate(sizes):
            message = source[:size] if event % 2 else np.empty(size, np.uint8)
            _native.copy(message, 0, np.full(size, event % 251, np.uint8), 0, size)
            if in_place and event % 2:  # a sender that waits would share the copy itself
                p2p.isend(message, RECEIVER, event).wait(soon())
            else:
                p2p.send(message, RECEIVER, event, soon())
        p2p.close()

    def receive() -> None:
        nonlocal num_lane_blocks
        p2p = P2p(there)
        for event, size in enumerate(sizes):
            message = p2p.recv(target[:size] if in_place else None, SENDER, event, soon())
            assert message.shape == (size,)
            assert (message == event % 251).all()
        num_lane_blocks = p2p.stats()[SENDER, "recv"]["num_lane_blocks"]
        p2p.close()

    run_threads(send, receive)
    return num_lane_blocks


def ring() -> None:
    """The ring with its positions in words."""
    layout, count = RingLayout(num_slots=8, slot_bytes=64), 3_000
    name = segment_name(POD, "attention", 5, 1)
    segment = Segment.create(
        name, SegmentLayout(2, 1 << 16, 4096), service="attention", index=5, incarnation=1
    )
    base = segment.layout.app_offset
    filled, emptied = Doorbell(segment.buf, base), Doorbell(segment.buf, base + 64)

    def wait(probe: Callable[[], object], bell: Doorbell) -> object:
        found = wait_until(probe, bell, Blocking(), soon(), check=lambda: None, check_interval_ns=NS_PER_S)
        assert found is not None
        return found

    def produce() -> None:
        producer = Producer(segment.managed, layout)
        for i in range(count):
            slot = wait(producer.try_claim, emptied)
            _native.copy(slot, 0, np.full(8, i, np.uint64), 0, 64)  # type: ignore[arg-type]
            producer.commit(64)
            filled.ring()

    def consume() -> None:
        consumer, out = Consumer(segment.managed, layout), np.zeros(8, np.uint64)
        for i in range(count):
            record = wait(consumer.peek, filled)
            _native.copy(out, 0, record.payload, 0, 64)  # type: ignore[attr-defined]
            assert (out == i).all()
            consumer.release()
            emptied.ring()

    run_threads(produce, consume)
    segment.unlink()


def dispatch() -> None:
    """Dispatch and combine of three ranks, float32 and both forms of INT8; every rank reads every other block."""
    from bus.xccl.dispatch import DispatchShape
    from tests.harness.dispatch_world import DispatchWorld

    plain = DispatchShape(num_ranks=3, max_tokens=6, top_k=2, hidden=96, num_local_experts=2)
    int8 = replace(plain, int8=True)
    for config, shape in (
        (SLEEPS, plain), (POLLS, plain), (POLLS, int8), (SLEEPS, replace(int8, deliver_int8=True))
    ):  # fmt: skip
        with DispatchWorld(shape, pod=POD, config=config) as world:
            rng = np.random.default_rng(3)
            inputs = [world.routed(rng, rng.integers(0, 7, 3).tolist()) for _ in range(STEPS)]

            def exchange(rank: int, world: DispatchWorld = world, inputs: list = inputs) -> None:
                one = world.one_int8 if world.shape.deliver_int8 else world.one
                for step, routed in enumerate(inputs, 1):
                    one(rank, routed[rank], Event(step, 0))

            run_threads(*[partial(exchange, rank) for rank in range(3)])


def withdraw() -> None:
    """A dispatch that its sender gives up, its rows overwritten before the other comes to it; then one that ends.

    The two take turns by Python's locks, which the sanitizer does not see. So what keeps the other from the new rows is
    what it finds in the sender's cell, and nothing else. (Who has begun to pull reads them, sees the cell afterwards,
    and drops what it has read: that is fences, which the sanitizer does not know. See tests/modelcheck.)
    """
    from bus.errors import EventMismatch, PeerStalled
    from bus.xccl.dispatch import Dispatcher
    from bus.xccl.dispatch_layout import DispatchShape
    from tests.harness.dispatch_world import DispatchWorld, Routed

    def dispatch(side: Dispatcher, routed: Routed, event: Event, deadline: Deadline) -> None:
        call = side.dispatch_int8 if side._shape.deliver_int8 else side.dispatch
        call(routed.x, routed.topk_idx, event=event, deadline=deadline)

    def refused(
        error: type[Exception], side: Dispatcher, routed: Routed, event: Event, timeout_ms: int
    ) -> None:
        try:
            dispatch(side, routed, event, Deadline.after_ms(timeout_ms))
        except error:
            return
        raise AssertionError(f"dispatch {event} was not withdrawn")

    def exchange(world: DispatchWorld, inputs: list, rank: int, turns: list[threading.Barrier]) -> None:
        side, one = world.ranks[rank], world.one_int8 if world.shape.deliver_int8 else world.one
        for step, routed in enumerate(inputs):
            given_up, next_one = Event(2 * step + 1, 0), Event(2 * step + 2, 0)
            if step % 2 == rank:
                refused(PeerStalled, side, routed[rank], given_up, 1)
                side._stage(routed[rank].x[::-1].copy(), routed[rank].topk_idx, next_one)
                turns[0].wait()
            else:
                turns[0].wait()
                refused(EventMismatch, side, routed[rank], given_up, 60_000)
            turns[1].wait()
            one(rank, routed[rank], next_one)

    plain = DispatchShape(num_ranks=2, max_tokens=6, top_k=2, hidden=96, num_local_experts=2)
    for config, shape in (
        (SLEEPS, plain), (POLLS, plain), (POLLS, replace(plain, int8=True, deliver_int8=True))
    ):  # fmt: skip
        with DispatchWorld(shape, pod=POD, config=config) as world:
            rng = np.random.default_rng(5)
            inputs = [world.routed(rng, [6, 6]) for _ in range(STEPS)]
            turns = [threading.Barrier(2, timeout=60) for _ in range(2)]
            run_threads(*[partial(exchange, world, inputs, rank, turns) for rank in range(2)])


def alltoall() -> None:
    """Pieces of every kind from three ranks to each other: staged, large in the app area, and a few bytes of it."""
    from bus.xccl.alltoall import AllToAllShape
    from tests.harness.alltoall_world import AllToAllWorld

    shape = AllToAllShape(num_ranks=3, stage_bytes=3 << 13, area_bytes=3 << 13)

    def exchange(world: AllToAllWorld, rank: int) -> None:
        side = world.ranks[rank]
        for step in range(1, 2 * STEPS):
            width = (1 << 13, 1 << 13, 64)[step % 3]
            rows = side.area((3, width), np.uint8) if step % 3 else np.empty((3, width), np.uint8)
            _native.copy(rows, 0, np.full((3, width), (step + rank) % 251, np.uint8), 0, 3 * width)
            out = np.empty((3, width), np.uint8) if step % 2 else None  # both ways of a call
            got = side.exchange_fixed(rows, event=Event(step, 0), deadline=soon(), out=out)
            assert (got == (step + np.arange(3)[:, None]) % 251).all()

    for config in (SLEEPS, POLLS):
        with AllToAllWorld(shape, pod=POD, config=config) as world:
            run_threads(*[partial(exchange, world, rank) for rank in range(3)])


def relay() -> None:
    """A2E and E2A, directly and through trampolines: four attention ranks and three expert ranks, a thread each."""
    from bus.xccl.cost import Route
    from bus.xccl.relay_layout import RelayShape
    from tests.harness.relay_world import RelayWorld, raise_error, routing, work

    shape = RelayShape(num_attention_ranks=4, num_expert_ranks=3, rows_max=5, num_slots=2, hidden=48)

    def attend(world: RelayWorld, left: list[int], index: int) -> None:
        rng, side = np.random.default_rng(index), world.attention[index]
        for step in range(1, STEPS):
            x, ranks, experts = routing(rng, shape, int(rng.integers(0, 6)))
            route = Route.DIRECT if step % 2 else Route.TRAMPOLINE
            handle = side.a2e_send(x, ranks, experts, Event(step, 0), route)
            out = np.zeros((handle.num_rows, shape.num_slots, shape.hidden), np.float32)
            side.e2a_recv(handle, out, soon())
        left.pop()

    def serve(world: RelayWorld, left: list[int], index: int) -> None:
        side = world.experts[index]
        while left:
            arrivals = side.poll(raise_error)
            for arrival in arrivals:
                work(arrival)
                side.commit(arrival)
            if not arrivals:
                side.wait(timeout_ns=10_000_000)

    for config in (SLEEPS, POLLS):
        with RelayWorld(shape, pod=POD, config=config) as world:
            left = [1] * shape.num_attention_ranks
            run_threads(
                *[partial(attend, world, left, i) for i in range(shape.num_attention_ranks)],
                *[partial(serve, world, left, i) for i in range(shape.num_expert_ranks)],
            )


SCENARIOS = {
    function.__name__: function for function in (p2p, lanes, share, ring, dispatch, withdraw, alltoall, relay)
}

if __name__ == "__main__":
    Segment.create, Segment.attach = create, attach  # type: ignore[method-assign, assignment]
    race_memory.install()
    sys.setswitchinterval(1e-4)
    SCENARIOS[sys.argv[1]]()
    print("finished", flush=True)
