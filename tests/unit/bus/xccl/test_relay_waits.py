"""Who waits in A2E/E2A sleeps in the end, and is woken by the first answer or request that comes then.

Owner locks are looked at too seldom here to find a message whose ring was lost.
"""

from __future__ import annotations

import struct
import threading

import numpy as np
import pytest

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.memory.segment import Segment
from bus.xccl.cost import Route
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.relay_layout import RelayShape
from tests.harness.poll import eventually
from tests.harness.relay_world import RelayWorld, raise_error, work

SHAPE = RelayShape(num_attention_ranks=1, num_expert_ranks=2, rows_max=2, num_slots=1, hidden=16)
TRUSTS = XcclConfig(spin_us=200, poll_interval_ms=60_000)
X, OWNERS = np.ones((2, 16), np.float32), np.array([[0], [1]], np.int32)
SLEEPERS, SLEEPERS_OFFSET = struct.Struct("=I"), 132
TIMEOUT_NS = 20_000_000_000


def await_sleep(segment: Segment) -> None:
    def is_asleep() -> bool:
        return bool(SLEEPERS.unpack_from(segment.buf, SLEEPERS_OFFSET)[0])

    eventually(is_asleep, timeout_s=20, interval_s=0.001)


def receive(world: RelayWorld, step: int, route: Route, asked: threading.Event) -> None:
    side, out = world.attention[0], np.zeros((2, 1, 16), np.float32)
    handle = side.a2e_send(X, OWNERS, OWNERS, Event(step, 0), route)
    asked.set()
    side.e2a_recv(handle, out, Deadline.after_ms(20_000))
    assert (out[0] != out[1]).all()


def serve_until(world: RelayWorld, thread: threading.Thread) -> None:
    while thread.is_alive():
        world.serve([0, 1])
        thread.join(0.0005)


@pytest.mark.parametrize("route", Route)
def test_an_attention_rank_that_sleeps_is_woken_by_its_answers(route: Route) -> None:
    with RelayWorld(SHAPE, config=TRUSTS) as world:
        for step in range(1, 60):
            asked, before = threading.Event(), world.attention[0].stats()["sleeps"]
            thread = threading.Thread(target=receive, args=(world, step, route, asked))
            thread.start()
            assert asked.wait(20)
            if step > 30:  # until then answers come at once, so polling pays
                await_sleep(world.segments[Rank("attention", 0)])
            serve_until(world, thread)
            if step > 30:
                assert world.attention[0].stats()["sleeps"] > before


def test_one_answer_alone_does_not_wake_who_needs_two() -> None:
    """Its ring is counted: the second one wakes."""
    with RelayWorld(SHAPE, config=XcclConfig(spin_us=0, poll_interval_ms=60_000)) as world:
        for step in range(1, 30):
            asked = threading.Event()
            thread = threading.Thread(target=receive, args=(world, step, Route.DIRECT, asked))
            thread.start()
            assert asked.wait(20)
            await_sleep(world.segments[Rank("attention", 0)])
            for rank in (step % 2, 1 - step % 2):
                assert len(world.serve([rank])) == 1
            thread.join(20)
            assert not thread.is_alive()
        assert world.attention[0].stats()["sleeps"] <= 29


def test_an_expert_rank_that_sleeps_is_woken_by_a_request() -> None:
    with RelayWorld(SHAPE, config=TRUSTS) as world:
        side, found = world.experts[0], []

        def wait() -> None:
            assert side.wait(timeout_ns=TIMEOUT_NS)
            for arrival in side.poll(raise_error):
                work(arrival)
                found.append(side.commit(arrival))

        side.poll(raise_error)
        for step in range(1, 30):
            thread = threading.Thread(target=wait)
            thread.start()
            await_sleep(world.segments[Rank("expert", 0)])
            world.attention[0].a2e_send(X[:1], OWNERS[:1], OWNERS[:1], Event(step, 0))
            thread.join(20)
            assert found == [True] * step
