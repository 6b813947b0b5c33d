"""A peer ends while somebody waits for it: the kernel tells of it, and if it did not, waiters look on their own.

A wait that notices nothing fails by the test's own time limit, which ends before the wait's deadline.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

from bus.clock import NS_PER_MS, Deadline
from bus.config import XcclConfig
from bus.errors import PeerDied
from bus.memory.segment import Segment
from bus.memory.wait import LOOK_TIMES_MAX, Blocking, next_look_ns
from bus.xccl.aio import AsyncP2p
from bus.xccl.alltoall import AllToAllShape
from bus.xccl.cost import Route
from bus.xccl.dispatch import DispatchShape
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.relay_layout import RelayShape
from tests.harness.alltoall_world import AllToAllWorld
from tests.harness.dispatch_world import DispatchWorld
from tests.harness.p2p_sides import A, B, two_sides
from tests.harness.relay_world import RelayWorld

NEVER_LOOKS = XcclConfig(spin_us=0, poll_interval_ms=600_000)
LOOKS = XcclConfig(spin_us=0, poll_interval_ms=5)


@dataclass(frozen=True)
class Wait:
    """A wait for a peer that does not come, and how that one ends."""

    call: Callable[[Deadline], object]
    end_peer: Callable[[], None]


def recv(pod: str, config: XcclConfig) -> Iterator[Wait]:
    a, b = two_sides(pod, Blocking(), config=config)
    b.p2p.accept(A)
    yield Wait(lambda deadline: b.p2p.recv(None, A, 1, deadline), a.close)
    b.close()


def grant(pod: str, config: XcclConfig) -> Iterator[Wait]:
    """A sender whose receiver never grants it a ring."""
    a, b = two_sides(pod, Blocking(), config=config)
    yield Wait(lambda deadline: a.p2p.send(np.zeros(1), B, 1, deadline), b.close)
    a.close()


def handle(pod: str, config: XcclConfig) -> Iterator[Wait]:
    a, b = two_sides(pod, Blocking(), config=config)
    b.p2p.accept(A)
    yield Wait(lambda deadline: b.p2p.irecv(None, A, 1).wait(deadline), a.close)
    b.close()


def loop(pod: str, config: XcclConfig) -> Iterator[Wait]:
    """The same awaited in an event loop."""
    a, b = two_sides(pod, Blocking(), config=config)
    b.p2p.accept(A)

    async def receive(deadline: Deadline) -> None:
        bridge = AsyncP2p(b.endpoint, b.p2p)
        try:
            await bridge.recv(None, A, 1, deadline)
        finally:
            bridge.close()

    yield Wait(lambda deadline: asyncio.run(receive(deadline)), a.close)
    b.close()


def dispatch(pod: str, config: XcclConfig) -> Iterator[Wait]:
    shape = DispatchShape(num_ranks=3, max_tokens=1, top_k=1, hidden=4, num_local_experts=1)
    with DispatchWorld(shape, pod, config=config) as world:
        x, idx = np.zeros((1, 4), np.float32), np.zeros((1, 1), np.int32)
        yield Wait(
            lambda deadline: world.ranks[0].dispatch(x, idx, event=Event(1, 0), deadline=deadline),
            world.segments[2].close,
        )


def alltoall(pod: str, config: XcclConfig) -> Iterator[Wait]:
    with AllToAllWorld(AllToAllShape(num_ranks=3), pod, config=config) as world:
        x = np.zeros((3, 1))
        yield Wait(
            lambda deadline: world.ranks[0].exchange_fixed(x, event=Event(1, 0), deadline=deadline),
            world.segments[2].close,
        )


def relay(pod: str, config: XcclConfig) -> Iterator[Wait]:
    shape = RelayShape(num_attention_ranks=1, num_expert_ranks=2, rows_max=1, num_slots=2, hidden=4)
    with RelayWorld(shape, pod=pod, config=config) as world:
        side, out = world.attention[0], np.zeros((1, 2, 4), np.float32)
        to = np.array([[0, 1]], np.int32)
        sent = side.a2e_send(np.zeros((1, 4), np.float32), to, to, Event(1, 0), Route.DIRECT)
        yield Wait(lambda deadline: side.e2a_recv(sent, out, deadline), lambda: world.end(Rank("expert", 1)))


WAITS = [recv, grant, handle, loop, dispatch, alltoall, relay]


def fails(call: Callable[[Deadline], object], match: str | None = None) -> None:
    """Expect `PeerDied` long before the deadline: once that has come, owner locks are looked at in any case."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(PeerDied, match=match):
        pool.submit(call, Deadline.after_ms(120_000)).result(60)


def run(wait: Wait) -> None:
    """End the peer once the wait sleeps, more or less: sooner or later is right, too."""
    timer = threading.Timer(0.1, wait.end_peer)
    timer.start()
    try:
        fails(wait.call)
    finally:
        timer.join()


@pytest.mark.parametrize("make", WAITS, ids=lambda make: make.__name__)
def test_the_kernel_tells(make: Callable[[str, XcclConfig], Iterator[Wait]], pod: str) -> None:
    for wait in make(pod, NEVER_LOOKS):
        run(wait)


@pytest.mark.parametrize("make", WAITS, ids=lambda make: make.__name__)
def test_or_else_waiters_look(
    make: Callable[[str, XcclConfig], Iterator[Wait]], pod: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segment, "sound_alarm", lambda self: None)
    for wait in make(pod, LOOKS):
        run(wait)


@pytest.mark.parametrize("make", WAITS, ids=lambda make: make.__name__)
def test_a_peer_that_ended_before_the_wait_is_found_at_once(
    make: Callable[[str, XcclConfig], Iterator[Wait]], pod: str
) -> None:
    for wait in make(pod, NEVER_LOOKS):
        wait.end_peer()
        fails(wait.call)


def test_a_new_address_ends_the_wait_for_the_one_before(pod: str) -> None:
    a, b = two_sides(pod, Blocking(), config=NEVER_LOOKS)
    b.p2p.accept(A)
    timer = threading.Timer(0.1, lambda: b.endpoint.learn(A, 2, a.endpoint.segment.name + "0"))
    timer.start()
    fails(lambda deadline: b.p2p.recv(None, A, 1, deadline), "incarnation 2 has replaced it")
    timer.join()
    a.close()
    b.close()


def test_a_bridge_keeps_a_deadline_that_came_after_it_slept(pod: str) -> None:
    """Its thread sleeps until the deadlines that it knows; a nearer one must wake it."""
    a, b = two_sides(pod, Blocking(), config=NEVER_LOOKS)
    b.p2p.accept(A)

    async def receive() -> None:
        bridge = AsyncP2p(b.endpoint, b.p2p)
        far = asyncio.create_task(bridge.recv(None, A, 1, Deadline.after_ms(600_000)))
        await asyncio.sleep(0.1)
        near = asyncio.create_task(bridge.recv(None, A, 2, Deadline.after_ms(50)))
        done, _ = await asyncio.wait([far, near], return_when=asyncio.FIRST_COMPLETED, timeout=60)
        assert done == {near}
        far.cancel()
        await asyncio.gather(far, near, return_exceptions=True)
        bridge.close()

    asyncio.run(receive())
    a.close()
    b.close()


def test_looks_become_rarer() -> None:
    interval, found = 20 * NS_PER_MS, []
    for _ in range(7):
        found.append(interval // NS_PER_MS)
        interval = next_look_ns(interval, 20 * NS_PER_MS)
    assert found == [20, 40, 80, 160, 320, 640, 640]
    assert LOOK_TIMES_MAX == 32


def test_an_address_that_comes_after_the_end_is_harmless(pod: str) -> None:
    a, b = two_sides(pod, Blocking(), config=NEVER_LOOKS)
    b.close()
    b.endpoint.learn(A, 2, a.endpoint.segment.name + "0")
    a.close()
