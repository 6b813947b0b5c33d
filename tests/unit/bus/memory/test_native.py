from __future__ import annotations

import mmap
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bus.clock import NS_PER_MS, NS_PER_S, now_ns
from bus.memory import _native

U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1


@pytest.fixture
def buf() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 4096) as mapping:
        yield mapping


def test_words_are_stored_and_loaded_at_their_width(buf: mmap.mmap) -> None:
    _native.store_u32(buf, 4, U32_MAX)
    _native.store_u64(buf, 8, U64_MAX)
    assert (_native.load_u32(buf, 0), _native.load_u32(buf, 4)) == (0, U32_MAX)
    assert (_native.load_u64(buf, 8), _native.load_u64(buf, 16)) == (U64_MAX, 0)
    assert _native.load_u64(memoryview(buf)[8:], 0) == U64_MAX


def test_fetch_add_returns_the_old_value_and_wraps(buf: mmap.mmap) -> None:
    assert _native.fetch_add_u32(buf, 0, -1) == 0
    assert _native.fetch_add_u32(buf, 0, 2) == U32_MAX
    assert _native.load_u32(buf, 0) == 1
    assert _native.load_u32(buf, 4) == 0
    assert _native.fetch_add_u64(buf, 8, U64_MAX) == 0
    assert _native.fetch_add_u64(buf, 8, 3) == U64_MAX
    assert _native.load_u64(buf, 8) == 2


def test_cas_swaps_only_what_was_expected(buf: mmap.mmap) -> None:
    assert _native.cas_u32(buf, 0, 0, 7)
    assert not _native.cas_u32(buf, 0, 0, 9)
    assert _native.load_u32(buf, 0) == 7


WORD_CALLS: list[tuple[Callable[..., Any], int, tuple[int, ...]]] = [
    (_native.load_u32, 4, ()),
    (_native.load_u64, 8, ()),
    (_native.store_u32, 4, (1,)),
    (_native.store_u64, 8, (1,)),
    (_native.fetch_add_u32, 4, (1,)),
    (_native.fetch_add_u64, 8, (1,)),
    (_native.cas_u32, 4, (0, 1)),
    (_native.futex_wait, 4, (1, 0)),
    (_native.futex_wake, 4, (1,)),
    (_native.wait_u32, 4, (1, 0, 0)),
    (_native.ring_doorbell, 8, ()),
    (_native.wait_doorbell, 8, (1, 0, 0)),
    (_native.write_cell, 32, (1, 2, 3, 4)),
    (_native.read_cell, 32, ()),
]
IDS = [call.__name__ for call, _, _ in WORD_CALLS]


@pytest.mark.parametrize(("call", "width", "rest"), WORD_CALLS, ids=IDS)
def test_bad_offsets_and_arguments_raise_and_touch_nothing(
    buf: mmap.mmap, call: Callable[..., Any], width: int, rest: tuple[int, ...]
) -> None:
    for offset in (-1, -width, 4096, 4096 - width + 32, 2**62, 2**63 - 32, 2**63, 2**100, -(2**100)):
        with pytest.raises(IndexError):
            call(buf, offset, *rest)
    for offset in (1, 2, 3, 5):
        with pytest.raises(ValueError, match="aligned"):
            call(buf, offset, *rest)
    for wrong in ((buf,), (buf, 0, *rest, 1), (buf, "0", *rest), (buf, 0.0, *rest), (7, 0, *rest)):
        with pytest.raises(TypeError):
            call(*wrong)
    with pytest.raises(TypeError):
        call(buf, offset=0)
    assert buf[:] == bytes(4096)


@pytest.mark.parametrize(("call", "width", "rest"), WORD_CALLS, ids=IDS)
def test_last_word_of_the_buffer_is_in_reach(
    buf: mmap.mmap, call: Callable[..., Any], width: int, rest: tuple[int, ...]
) -> None:
    call(buf, 4096 - width, *rest)


@pytest.mark.parametrize(
    ("call", "args"),
    [
        (_native.store_u32, (0, 2**32)),
        (_native.store_u32, (0, -1)),
        (_native.store_u64, (0, 2**64)),
        (_native.store_u64, (0, -1)),
        (_native.fetch_add_u64, (0, 2**64)),
        (_native.fetch_add_u64, (0, -(2**63) - 1)),
        (_native.cas_u32, (0, 2**32, 0)),
        (_native.cas_u32, (0, 0, -1)),
        (_native.futex_wait, (0, 0, -1)),
        (_native.futex_wake, (0, 2**31)),
        (_native.wait_u32, (0, 0, -1, 0)),
        (_native.wait_u32, (0, 0, 0, 2**63)),
        (_native.wait_doorbell, (0, -1, 0, 0)),
        (_native.write_cell, (0, 1, 2, 3, 2**64)),
    ],
)
def test_values_outside_the_word_raise_value_error(
    buf: mmap.mmap, call: Callable[..., Any], args: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"outside|does not fit"):
        call(buf, *args)
    assert buf[:] == bytes(4096)


def test_a_store_into_a_read_only_buffer_is_refused() -> None:
    for call, rest in ((_native.store_u32, (1,)), (_native.fetch_add_u32, (1,)), (_native.ring_doorbell, ())):
        with pytest.raises(BufferError):
            call(bytes(8), 0, *rest)
    assert _native.load_u32(bytes(8), 0) == 0


def test_a_closed_mapping_is_refused() -> None:
    mapping = mmap.mmap(-1, 4096)
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        _native.load_u32(mapping, 0)


def test_futex_wait_returns_at_once_when_the_value_differs(buf: mmap.mmap) -> None:
    assert _native.futex_wait(buf, 0, 1, 10 * NS_PER_S)


def test_waits_time_out_and_say_so(buf: mmap.mmap) -> None:
    start_ns = now_ns()
    assert not _native.futex_wait(buf, 0, 0, 2 * NS_PER_MS)
    assert _native.wait_u32(buf, 0, 0, NS_PER_MS, 2 * NS_PER_MS) == 0
    assert _native.wait_doorbell(buf, 0, 0, NS_PER_MS, 2 * NS_PER_MS) == 0
    assert _native.wait_doorbell(buf, 0, 0, 10 * NS_PER_S, 2 * NS_PER_MS) == 0
    assert 8 * NS_PER_MS <= now_ns() - start_ns < 5 * NS_PER_S
    assert buf[:8] == bytes(8), "a waiter that gave up takes its own mark away"


def test_the_longest_timeout_does_not_overflow(buf: mmap.mmap) -> None:
    assert _native.wait_u32(buf, 0, 7, 0, 2**63 - 1) == 0
    thread = threading.Thread(target=_native.wait_doorbell, args=(buf, 0, 0, 0, 2**63 - 1))
    thread.start()
    _native.ring_doorbell(buf, 0)
    thread.join(10)
    assert not thread.is_alive()


def test_futex_wake_wakes_a_sleeper_and_counts_it(buf: mmap.mmap) -> None:
    assert _native.futex_wake(buf, 0, 1) == 0
    woken: list[bool] = []
    thread = threading.Thread(target=lambda: woken.append(_native.futex_wait(buf, 0, 0, 10 * NS_PER_S)))
    thread.start()
    deadline_ns = now_ns() + 10 * NS_PER_S
    while _native.futex_wake(buf, 0, 1) == 0 and now_ns() < deadline_ns:
        _native.wait_u32(buf, 64, 0, 0, NS_PER_MS)
    thread.join(10)
    assert woken == [True]


def test_a_ring_before_the_wait_is_not_missed(buf: mmap.mmap) -> None:
    assert _native.ring_doorbell(buf, 0) == 1
    assert _native.wait_doorbell(buf, 0, 0, 0, 10 * NS_PER_S) == 1


def test_a_ring_leaves_the_sleepers_mark_alone(buf: mmap.mmap) -> None:
    _native.store_u32(buf, 4, 3)
    _native.ring_doorbell(buf, 0)
    assert _native.load_u32(buf, 4) == 3


def test_the_doorbell_wraps(buf: mmap.mmap) -> None:
    _native.store_u32(buf, 0, U32_MAX)
    assert _native.ring_doorbell(buf, 0) == 0
    assert _native.wait_doorbell(buf, 0, U32_MAX, 0, 0) == 0


def test_a_signal_handler_runs_and_its_exception_ends_the_wait(buf: mmap.mmap) -> None:
    class _StopError(Exception):
        pass

    def handler(signum: int, frame: object) -> None:
        raise _StopError

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(_StopError):
            _native.wait_doorbell(buf, 0, 0, 0, 20 * NS_PER_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert _native.load_u32(buf, 4) == 0


def test_a_wait_goes_on_after_a_harmless_signal(buf: mmap.mmap) -> None:
    calls: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda signum, frame: calls.append(signum))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        start_ns = now_ns()
        assert not _native.futex_wait(buf, 0, 0, 40 * NS_PER_MS)
        assert now_ns() - start_ns >= 40 * NS_PER_MS
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert calls


def test_cells_round_trip_and_are_empty_without_a_sequence_word(buf: mmap.mmap) -> None:
    assert _native.read_cell(buf, 32) is None
    _native.write_cell(buf, 32, 5, U64_MAX, 0, 7)
    assert _native.read_cell(buf, 32) == (5, U64_MAX, 0, 7)
    assert buf[:32] == bytes(32)
    assert buf[64:96] == bytes(32)
    _native.write_cell(buf, 32, 0, 1, 2, 3)
    assert _native.read_cell(buf, 32) is None


SIZES = (0, 1, 15, 16, 127, 128, 129, 4096, 16383, 16384, 70001)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dst_offset", "src_offset"), [(0, 0), (0, 16), (16, 0), (1, 3), (2064, 0), (0, 4095)]
)
def test_copy_moves_exactly_the_range(size: int, dst_offset: int, src_offset: int) -> None:
    rng = np.random.default_rng(size)
    src = rng.integers(0, 256, src_offset + size + 9, dtype=np.uint8)
    dst = rng.integers(0, 256, dst_offset + size + 9, dtype=np.uint8)
    expected = dst.copy()
    expected[dst_offset : dst_offset + size] = src[src_offset : src_offset + size]
    _native.copy(dst, dst_offset, src, src_offset, size)
    assert np.array_equal(dst, expected)


@pytest.mark.parametrize(("dst_offset", "src_offset"), [(0, 0), (0, 100), (100, 0), (5000, 0)])
def test_overlapping_copies_behave_like_memmove(dst_offset: int, src_offset: int) -> None:
    data = np.arange(20000, dtype=np.uint16).view(np.uint8)
    expected = data.copy()
    expected[dst_offset : dst_offset + 30000] = data[src_offset : src_offset + 30000].copy()
    _native.copy(data, dst_offset, data, src_offset, 30000)
    assert np.array_equal(data, expected)


@pytest.mark.parametrize(
    "args", [(90, 0, 11), (0, 90, 11), (-1, 0, 1), (0, -1, 1), (0, 0, -1), (2**63, 0, 1)]
)
def test_copy_refuses_ranges_outside_either_buffer(args: tuple[int, int, int]) -> None:
    dst, src = bytearray(100), bytes(range(100))
    with pytest.raises(IndexError):
        _native.copy(dst, args[0], src, args[1], args[2])
    assert dst == bytes(100)
