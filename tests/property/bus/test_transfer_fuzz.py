"""Any bytes in a transfer table, whoever wrote them: a clean error or a whole fetch, nothing outside the own blocks."""

from __future__ import annotations

import uuid

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.control.messages import KvTicket
from bus.distflow.table import TRAILER
from bus.memory import _native
from tests.harness.transfer_world import BLOCK_BYTES, LAYOUT, SinkSide, SourceSide

U64 = st.one_of(
    st.integers(0, 2**64 - 1), st.integers(0, 9), st.sampled_from([1 << 63, 1 << 32, (1 << 63) | 1])
)
TABLE_WORDS = (LAYOUT.app_bytes - LAYOUT.table_offset) // 8
INTS = st.one_of(st.integers(-2, 9), st.integers(-(2**63), 2**64 - 1))


class GuardedSink(SinkSide):
    """A sink whose blocks 1 to 6 are its own, between two guards that nobody may write."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[:] = 0xABAB_ABAB
        self.inner = SinkSide(num_blocks=6)
        self.inner.sink.close()
        self.inner.sink = type(self.sink)(
            memoryview(self.blocks)[1:7].cast("B"),  # type: ignore[arg-type]
            num_blocks=6,
            block_bytes=BLOCK_BYTES,
            index=0,
            incarnation=1,
            rank="attention-0",
        )

    def check(self) -> None:
        """Assert that the guards stand."""
        assert (self.blocks[[0, 7]] == 0xABAB_ABAB).all()


def fetch_all(side: SinkSide, ticket: KvTicket, block_ids: list[int], first_block: int) -> str:
    side.sink.post(1, ticket, first_block, block_ids)
    while side.sink.progress(300):
        pass
    (completion,) = side.sink.completions()
    return completion.error


@settings(max_examples=300, deadline=None)
@given(words=st.lists(st.tuples(st.integers(0, TABLE_WORDS - 1), U64), min_size=1, max_size=6))
def test_any_words_in_the_table(words: list[tuple[int, int]]) -> None:
    prefill, decode = SourceSide(f"fuzz{uuid.uuid4().hex[:12]}"), GuardedSink()
    try:
        ticket = prefill.source.offer([1, 2, 5], 40, b"payload")
        start = prefill.segment.layout.app_offset + LAYOUT.table_offset
        for place, value in words:
            _native.store_u64(prefill.segment.buf, start + 8 * place, value)
        error = fetch_all(decode.inner, ticket, [0, 1, 2], 0)
        decode.check()
        if not error:
            assert decode.blocks[1:4, 0].tolist() == [2, 3, 6]
        prefill.source.ended()
        prefill.source.withdraw_all()
        assert prefill.source.counters.bytes_sent in (0, 3 * BLOCK_BYTES)
        assert prefill.source.ended() in ([], [ticket.serial]) and prefill.source.num_standing == 0
    finally:
        decode.inner.close()
        prefill.close()


@settings(max_examples=200, deadline=None)
@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "index": INTS,
            "incarnation": INTS,
            "slot": INTS,
            "serial": INTS,
            "num_tokens": INTS,
            "block_ids": st.lists(INTS, max_size=5).map(tuple),
            "segment": st.text(max_size=30),
        },
    ),
    block_ids=st.lists(INTS, max_size=5),
    first_block=INTS,
)
def test_any_ticket(changes: dict[str, object], block_ids: list[int], first_block: int) -> None:
    prefill, decode = SourceSide(f"fuzz{uuid.uuid4().hex[:12]}"), GuardedSink()
    try:
        ticket = msgspec.structs.replace(prefill.source.offer([1, 2, 5], 40), **changes)
        error = fetch_all(decode.inner, ticket, block_ids, first_block)
        decode.check()
        if error:
            assert (decode.blocks == 0xABAB_ABAB).all()
        else:
            assert ticket.block_ids == (1, 2, 5)
    finally:
        decode.inner.close()
        prefill.close()


@settings(max_examples=200, deadline=None)
@given(trailer=st.binary(min_size=TRAILER.size, max_size=TRAILER.size), keep=st.integers(0, TRAILER.size))
def test_any_trailer(trailer: bytes, keep: int) -> None:
    prefill, decode = SourceSide(f"fuzz{uuid.uuid4().hex[:12]}"), GuardedSink()
    try:
        ticket = prefill.source.offer([1, 2, 5], 40)
        start = prefill.segment.layout.app_offset + LAYOUT.trailer_offset
        own = prefill.segment.buf[start : start + TRAILER.size]
        changed = own[:keep] + trailer[keep:]
        prefill.segment.buf[start : start + TRAILER.size] = changed
        assert (fetch_all(decode.inner, ticket, [0, 1, 2], 0) == "") == (changed == own)
        decode.check()
    finally:
        decode.inner.close()
        prefill.close()


def test_a_guard_that_is_written_is_seen() -> None:
    decode = GuardedSink()
    decode.blocks[7] = np.uint32(1)
    try:
        decode.check()
    except AssertionError:
        return
    finally:
        decode.inner.close()
    raise AssertionError("the guard says nothing")
