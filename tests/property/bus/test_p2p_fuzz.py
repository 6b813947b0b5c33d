"""A peer that scribbles: whatever lies in its cells and slots, the survivor raises or delivers, in bounds and in time.

The own side is real; the other side's bytes are overwritten at random between the calls. Run under AddressSanitizer
by tests/native, where a read or write out of bounds ends the process.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.errors import BusError
from bus.memory import _native
from bus.memory.ring import RECORD, RECORD_BYTES, SLOTS_OFFSET, RingLayout
from bus.xccl.endpoint import P2P_ACK_LANE, P2P_DATA_LANE, Endpoint, World, stamp
from bus.xccl.message import TAG, TAG_BYTES
from bus.xccl.p2p import P2p

WORLD = World.of(attention=1, expert=1)
A, B = WORLD.ranks
RING = RingLayout(num_slots=3, slot_bytes=192)
MESSAGE_BYTES_MAX = 4096

EDGES = st.sampled_from(
    [0, 1, 2, 3, 4, 5, 64, 191, 192, 193, 2**31, 2**32 - 1, 2**32, 2**48 - 1, 2**63, 2**64 - 1]
)
WORDS = st.one_of(EDGES, st.integers(0, 8), st.integers(0, 2**64 - 1))
NAMES = st.one_of(
    st.sampled_from([b"<f4", b"|u1", b"<i8", b"<c16", b"<f9", b"<u0", b"", b"\xff\xff\xff\xff"]),
    st.binary(max_size=4),
)
TAGS = st.one_of(
    st.binary(min_size=TAG_BYTES, max_size=TAG_BYTES),
    st.builds(
        TAG.pack,
        NAMES,
        st.integers(0, 10),
        st.integers(0, 5),
        st.sampled_from([0, 0, 0, 1, 65535]),
        *[WORDS] * 4,
    ),
)


@st.composite
def records(draw: st.DrawFn) -> bytes:
    """A record that is right about its place more often than not, followed by payload."""
    position, num_bytes = (
        draw(st.one_of(st.integers(0, 4), WORDS)),
        draw(st.one_of(st.integers(0, 193), WORDS)),
    )
    chunk_id, event_id = draw(st.integers(0, 3)), draw(st.integers(1, 2))
    head = RECORD.pack(position, num_bytes & 0xFFFFFFFF, chunk_id, event_id, draw(TAGS))
    return head + draw(st.binary(max_size=80))


@contextlib.contextmanager
def pair() -> Iterator[tuple[Endpoint, Endpoint]]:
    pod = f"fuzz{uuid.uuid4().hex[:12]}"
    made = [
        Endpoint(
            pod=pod,
            world=WORLD,
            me=me,
            incarnation=1,
            config=XcclConfig(spin_us=0),
            p2p_peers=[peer],
            p2p_ring=RING,
            app_bytes=4096,
        )
        for me, peer in ((A, B), (B, A))
    ]
    try:
        for endpoint in made:
            for other in made:
                endpoint.learn(other.me, 1, other.segment.name)
        yield made[0], made[1]
    finally:
        for endpoint in made:
            endpoint.close()


@settings(max_examples=250, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), records(), st.one_of(st.integers(0, 5), WORDS)), min_size=1, max_size=6
    )
)
def test_a_receiver_survives_any_bytes(writes: list[tuple[int, bytes, int]]) -> None:
    with pair() as (_a, b):
        p2p = P2p(b, message_bytes_max=MESSAGE_BYTES_MAX)
        p2p.accept(A)
        ring = b.ring_offset(A)
        assert ring is not None
        for counter, (slot, content, tail) in enumerate(writes, 1):
            at = ring + SLOTS_OFFSET + slot * (RECORD_BYTES + RING.slot_bytes)
            b.segment.buf[at : at + len(content)] = content
            cell = b.cell_from(A, P2P_DATA_LANE)
            _native.write_cell(b.segment.buf, cell, stamp(1, counter), 1, 0, tail)
            deadline = Deadline.after_ms(0)
            with contextlib.suppress(BusError, ValueError):
                array = p2p.recv(None, A, 1, deadline)
                assert array.nbytes <= MESSAGE_BYTES_MAX
            with contextlib.suppress(BusError, ValueError):
                p2p.recv(np.zeros(7, np.float32), A, 2, deadline)
            with contextlib.suppress(BusError, ValueError):
                p2p.probe(A)
            with contextlib.suppress(BusError, ValueError):
                p2p.peek(A, 1, deadline).sum()
            with contextlib.suppress(BusError, ValueError):
                p2p.recv_parts(A, 1, deadline)
            with contextlib.suppress(BusError, ValueError):
                p2p.discard(A, deadline)
        p2p.close()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS, st.integers(0, 2)), min_size=1, max_size=8))
def test_a_sender_survives_any_acknowledgement(acks: list[tuple[int, int, int, int]]) -> None:
    with pair() as (a, b):
        receiver, p2p = P2p(b), P2p(a)
        receiver.accept(A)
        cell = a.cell_from(B, P2P_ACK_LANE)
        for counter, (w1, w2, w3, size) in enumerate(acks, 1):
            with contextlib.suppress(BusError):
                p2p.send(np.zeros(100 * size), B, 1, Deadline.after_ms(0))
            _native.write_cell(a.segment.buf, cell, stamp(1, counter), w1, w2, w3)
            with contextlib.suppress(BusError):
                p2p.send(np.zeros(100 * size), B, 1, Deadline.after_ms(0))
            tail = p2p.sender(B).tail
            with contextlib.suppress(BusError):
                p2p.sender(B)._taken(tail, 1, 0)
        p2p.close()
        receiver.close()
