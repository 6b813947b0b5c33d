"""A signal in the middle of a wait: its handler runs at once; what it raises ends the call, otherwise the wait goes on.

So Ctrl-C ends a process that waits for a peer. Every wait here is in C, without the interpreter's lock.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import PeerStalled
from bus.memory.wait import Blocking
from bus.xccl.alltoall import AllToAllShape
from bus.xccl.cost import Route
from bus.xccl.dispatch import DispatchShape
from bus.xccl.event import Event
from bus.xccl.relay_layout import RelayShape
from tests.harness.alltoall_world import AllToAllWorld
from tests.harness.dispatch_world import DispatchWorld
from tests.harness.p2p_sides import A, soon, two_sides
from tests.harness.relay_world import RelayWorld

Wait = Callable[[Deadline], object]
SIGNAL_S = 0.05
CALM = XcclConfig(spin_us=0, poll_interval_ms=60_000)  # nobody looks up by himself


class Interrupted(Exception):
    """What the handler raises."""


def recv(pod: str) -> Iterator[Wait]:
    a, b = two_sides(pod, Blocking(), config=CALM)
    b.p2p.accept(A)
    yield lambda deadline: b.p2p.recv(None, A, 1, deadline)
    a.close()
    b.close()


def dispatch(pod: str) -> Iterator[Wait]:
    shape = DispatchShape(num_ranks=2, max_tokens=1, top_k=1, hidden=4, num_local_experts=1)
    with DispatchWorld(shape, pod, config=CALM) as world:
        x, idx = np.zeros((1, 4), np.float32), np.zeros((1, 1), np.int32)
        yield lambda deadline: world.ranks[0].dispatch(x, idx, event=Event(1, 0), deadline=deadline)


def alltoall(pod: str) -> Iterator[Wait]:
    with AllToAllWorld(AllToAllShape(num_ranks=2), pod, config=CALM) as world:
        x = np.zeros((2, 1))
        yield lambda deadline: world.ranks[0].exchange_fixed(x, event=Event(1, 0), deadline=deadline)


def relay(pod: str) -> Iterator[Wait]:
    shape = RelayShape(num_attention_ranks=1, num_expert_ranks=1, rows_max=1, num_slots=1, hidden=4)
    with RelayWorld(shape, pod=pod, config=CALM) as world:
        side, out = world.attention[0], np.zeros((1, 1, 4), np.float32)
        to = np.zeros((1, 1), np.int32)
        handle = side.a2e_send(np.zeros((1, 4), np.float32), to, to, Event(1, 0), Route.DIRECT)
        yield lambda deadline: side.e2a_recv(handle, out, deadline)


@pytest.fixture(params=[recv, dispatch, alltoall, relay], ids=lambda make: make.__name__)
def wait(request: pytest.FixtureRequest, pod: str) -> Iterator[Wait]:
    """A call that waits for a peer that does not come."""
    yield from request.param(pod)


@pytest.fixture
def alarm() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Have a function run as a signal's handler, soon and again and again."""
    before = signal.getsignal(signal.SIGALRM)

    def start(work: Callable[[], None]) -> None:
        signal.signal(signal.SIGALRM, lambda *_: work())
        signal.setitimer(signal.ITIMER_REAL, SIGNAL_S, SIGNAL_S)

    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_what_a_handler_raises_ends_the_wait(wait: Wait, alarm: Callable[..., None]) -> None:
    def interrupt() -> None:
        raise Interrupted

    alarm(interrupt)
    with pytest.raises(Interrupted):
        wait(soon())


def test_a_wait_goes_on_after_a_handler_that_returns(wait: Wait, alarm: Callable[..., None]) -> None:
    assert threading.current_thread() is threading.main_thread()
    calls: list[None] = []
    alarm(lambda: calls.append(None))
    with pytest.raises(PeerStalled):
        wait(Deadline.after_ms(500))
    assert calls
