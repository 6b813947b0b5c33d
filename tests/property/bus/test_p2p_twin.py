"""Random messages through random rings: the fast path delivers and refuses exactly what its slow twin does."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import EventMismatch, Truncated
from bus.memory.ring import RingLayout
from bus.xccl.endpoint import Endpoint, World
from bus.xccl.p2p import P2p, SlowP2p
from bus.xccl.reference import P2pReference

WORLD = World.of(attention=1, expert=1)
SENDER, RECEIVER = WORLD.ranks
TIMEOUT_MS = 20_000


@dataclass(frozen=True)
class Step:
    """One message and how the receiver first goes wrong about it, if it does."""

    shape: tuple[int, ...]
    dtype: str
    event_id: int
    mistake: str


STEPS = st.builds(
    Step,
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    dtype=st.sampled_from(["<f4", "<f8", "|u1", "<i8", "|b1"]),
    event_id=st.integers(0, 2**64 - 1),
    mistake=st.sampled_from(["", "", "event", "short", "dtype", "discard"]),
)


def payload(step: Step, number: int) -> npt.NDArray[Any]:
    count = int(np.prod(step.shape))
    return (np.arange(count) + number).astype(step.dtype).reshape(step.shape)


@contextmanager
def linked_pair(
    ring: RingLayout, forms: tuple[type[P2p | SlowP2p], type[P2p | SlowP2p]]
) -> Iterator[tuple[P2p | SlowP2p, P2p | SlowP2p]]:
    pod = f"prop{uuid.uuid4().hex[:12]}"
    endpoints = [
        Endpoint(
            pod=pod,
            world=WORLD,
            me=me,
            incarnation=1,
            config=XcclConfig(),
            p2p_peers=[peer],
            p2p_ring=ring,
        )
        for me, peer in ((SENDER, RECEIVER), (RECEIVER, SENDER))
    ]
    try:
        for endpoint in endpoints:
            for other in endpoints:
                endpoint.learn(other.me, 1, other.segment.name)
        yield forms[0](endpoints[0]), forms[1](endpoints[1])
    finally:
        for endpoint in endpoints:
            endpoint.close()


def outcome(action: Any) -> tuple[str, Any]:
    """Run `action`; return what it did in a form that two implementations can be compared by."""
    try:
        result = action()
    except (EventMismatch, Truncated, ValueError) as error:
        return type(error).__name__, None
    if isinstance(result, np.ndarray):
        return "array", (result.dtype.str, result.shape, result.tobytes())
    return "value", result


def compare(step: Step, fast: P2p | SlowP2p, slow: P2pReference) -> None:
    def recv(event_id: int, out: npt.NDArray[Any] | None) -> None:
        deadline = Deadline.after_ms(TIMEOUT_MS)
        mine = None if out is None else out.copy()
        expected = outcome(lambda: slow.recv(out, SENDER, RECEIVER, event_id))
        assert outcome(lambda: fast.recv(mine, SENDER, event_id, deadline)) == expected

    right = np.empty(step.shape, step.dtype)
    if step.mistake == "event":
        recv(step.event_id ^ 1, None)
    elif step.mistake == "short" and right.nbytes:
        recv(step.event_id, np.empty(right.nbytes - 1, np.uint8))
    elif step.mistake == "dtype":
        recv(step.event_id, np.empty((*step.shape, 1, 1), step.dtype))
    if step.mistake == "discard" and isinstance(fast, P2p):
        dropped = outcome(lambda: fast.discard(SENDER, Deadline.after_ms(TIMEOUT_MS)))
        assert dropped == outcome(lambda: slow.discard(SENDER, RECEIVER)) == ("value", step.event_id)
    else:
        recv(step.event_id, right if step.mistake else None)


@pytest.mark.parametrize("forms", [(P2p, P2p), (SlowP2p, P2p), (P2p, SlowP2p)], ids=["c-c", "py-c", "c-py"])
@settings(max_examples=40, deadline=None)
@given(
    st.lists(STEPS, min_size=1, max_size=12),
    st.builds(RingLayout, num_slots=st.integers(1, 5), slot_bytes=st.integers(128, 400)),
)
def test_p2p_equals_its_twin(
    forms: tuple[type[P2p | SlowP2p], type[P2p | SlowP2p]], steps: list[Step], ring: RingLayout
) -> None:
    slow = P2pReference()
    failures: list[BaseException] = []
    with linked_pair(ring, forms) as (sender, receiver):

        def send_all() -> None:
            try:
                for number, step in enumerate(steps):
                    deadline = Deadline.after_ms(TIMEOUT_MS)
                    sender.send(payload(step, number), RECEIVER, step.event_id, deadline)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=send_all)
        thread.start()
        try:
            for number, step in enumerate(steps):
                slow.send(payload(step, number), SENDER, RECEIVER, step.event_id)
                compare(step, receiver, slow)
        finally:
            thread.join(TIMEOUT_MS / 1000 + 5)
    assert failures == []
