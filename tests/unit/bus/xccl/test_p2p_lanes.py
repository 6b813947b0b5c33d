"""Lanes: threads of one receiver that share a long copy. They race with each other, other links and errors."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import uuid
from collections.abc import Iterator

import numpy as np
import pytest

from bus.config import XcclConfig
from bus.errors import SegmentCorrupt
from bus.memory.ring import RECORD_BYTES, SLOTS_OFFSET, RingLayout
from bus.xccl.message import POINTER
from tests.harness.p2p_sides import A, B, Side, soon, together, two_sides
from tests.harness.reading import NO_READING, can_read_processes

BLOCK = 256 * 1024
LANES, APP_BYTES = 8, 16 * BLOCK
NUM_PAIRS = 3
NEEDS_READING = pytest.mark.skipif(not can_read_processes(), reason=NO_READING)


@pytest.fixture
def pairs() -> Iterator[list[tuple[Side, Side]]]:
    """Several links with lanes, in one process."""
    made = [
        two_sides(f"lane{uuid.uuid4().hex[:12]}", config=XcclConfig(num_lanes=LANES), app_bytes=APP_BYTES)
        for _ in range(NUM_PAIRS)
    ]
    for _, b in made:
        b.p2p.accept(A)
    yield made
    for sides in made:
        for side in sides:
            side.close()


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def await_threads(num: int) -> None:
    """Wait until no more than `num` are left; a lane ends when it finds no block."""
    while num_threads() > num:
        os.sched_yield()


def pulled(sides: tuple[Side, Side], seed: int, num_bytes: int, start: int) -> None:
    """Send bytes of the app area by `isend`; the receiver copies them in lanes."""
    a, b = sides
    a.app[start : start + num_bytes] = np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)
    sent = a.p2p.isend(a.app[start : start + num_bytes], B, seed)
    assert not sent.test()
    got = b.p2p.recv(None, A, seed, soon())
    sent.wait(soon())
    assert np.array_equal(got, a.app[start : start + num_bytes])


@pytest.mark.parametrize("extra", [-1, 0, 1, 4095])
def test_every_byte_of_a_block_comes(pairs: list[tuple[Side, Side]], extra: int) -> None:
    for num_blocks in (2, 3, 15):
        pulled(pairs[0], num_blocks, num_blocks * BLOCK + extra, 3)


def test_lanes_of_several_links_at_once(pairs: list[tuple[Side, Side]]) -> None:
    """Each copy has its own blocks: none is left out, none done for another copy."""
    before = num_threads()
    errors: list[BaseException] = []

    def play(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for i in range(25):
                size = int(rng.integers(2 * BLOCK, 12 * BLOCK))
                pulled(pairs[seed], seed * 1000 + i, size, int(rng.integers(0, APP_BYTES - size)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=play, args=(seed,)) for seed in range(NUM_PAIRS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert sum(b.p2p.stats()[A, "recv"]["num_lane_blocks"] for _, b in pairs) > 0
    await_threads(before)


@NEEDS_READING
def test_a_block_that_cannot_be_read_fails_the_copy_once_all_lanes_are_out(
    pairs: list[tuple[Side, Side]],
) -> None:
    """Memory that the sender has given back in the middle: corrupt, and what is there arrives with the next call."""
    a, b = pairs[0]
    together(lambda: a.p2p.send(np.ones(3), B, 0, soon()), lambda: b.p2p.recv(None, A, 0, soon()))
    num_bytes, before = 12 * BLOCK, num_threads()
    x = np.random.default_rng(3).integers(0, 256, num_bytes, np.uint8)
    hole = mmap.mmap(-1, num_bytes + 16 * BLOCK)
    address = ctypes.addressof(ctypes.c_char.from_buffer(hole))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + 5 * BLOCK), ctypes.c_size_t(2 * BLOCK), 0) == 0

    def recv() -> None:
        while b.p2p.probe(A) is None:
            assert b.p2p.receiver(A)._wait(0, soon())
        ring = b.endpoint.ring_offset(A)
        assert ring is not None
        at = ring + SLOTS_OFFSET + RingLayout(4, 256).slot_stride + RECORD_BYTES
        buf = b.endpoint.segment.buf
        offered = bytes(buf[at : at + 8])
        buf[at : at + 8] = POINTER.pack(address)
        for _ in range(20):
            handle = b.p2p.irecv(
                np.zeros(num_bytes, np.uint8), A, 1
            )  # it must not wait, so it shares with lanes only
            with pytest.raises(SegmentCorrupt, match="sender's memory"):
                handle.test()
            handle.cancel()
        buf[at : at + 8] = offered
        assert np.array_equal(b.p2p.recv(None, A, 1, soon()), x)

    together(lambda: a.p2p.send(x, B, 1, soon()), recv)
    await_threads(before)
    assert libc.mprotect(ctypes.c_void_p(address + 5 * BLOCK), ctypes.c_size_t(2 * BLOCK), 3) == 0
