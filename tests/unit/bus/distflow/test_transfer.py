"""Offers, fetches, withdrawals: what each side sees, and what it refuses."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from bus.distflow.sink import KvSink
from bus.distflow.source import KvSource, NoFreeSlot
from bus.distflow.table import DONE_BYTES, SERIAL_MAX, TransferLayout
from bus.memory import _native
from tests.harness.transfer_world import BLOCK_BYTES, LAYOUT, SinkSide, SourceSide


def test_blocks_arrive_where_they_belong_and_both_sides_count_them(
    prefill: SourceSide, decode: SinkSide
) -> None:
    ticket = prefill.source.offer([5, 2, 3], 40)
    assert prefill.source.ended() == []
    assert decode.fetch(ticket, [7, 0, 1]) == ""
    assert decode.blocks[:, 0].tolist() == [3, 4, 0, 0, 0, 0, 0, 6]
    assert (decode.blocks == decode.blocks[:, :1]).all()
    assert prefill.source.ended() == [ticket.serial]
    assert prefill.source.ended() == []
    sent, received = prefill.source.counters, decode.sink.counters
    assert (sent.offers, sent.offers_fetched, sent.blocks_offered, sent.blocks_sent) == (1, 1, 3, 3)
    assert sent.bytes_sent == received.bytes_fetched == 3 * BLOCK_BYTES
    assert (received.fetches, received.fetches_completed, received.blocks_fetched) == (1, 1, 3)


def test_blocks_that_are_cached_already_are_not_moved(prefill: SourceSide, decode: SinkSide) -> None:
    ticket = prefill.source.offer([5, 2, 3], 40)
    assert decode.fetch(ticket, [6], first_block=2) == ""
    assert decode.blocks[:, 0].tolist() == [0, 0, 0, 0, 0, 0, 4, 0]
    assert prefill.source.ended() == [ticket.serial]
    assert prefill.source.counters.blocks_sent == 1


def test_a_fetch_of_nothing_ends_the_offer_too(prefill: SourceSide, decode: SinkSide) -> None:
    ticket = prefill.source.offer([5, 2], 32)
    assert decode.fetch(ticket, [], first_block=2) == ""
    assert not decode.blocks.any()
    assert prefill.source.ended() == [ticket.serial]
    assert prefill.source.counters.blocks_sent == 0


def test_a_payload_goes_with_the_blocks(prefill: SourceSide, decode: SinkSide) -> None:
    payload = bytes(range(100))
    ticket = prefill.source.offer([1], 1, payload)
    decode.sink.post(1, ticket, 0, [0])
    assert not decode.sink.progress(1 << 20)
    (completion,) = decode.sink.completions()
    assert completion.payload == payload and completion.error == ""
    with pytest.raises(ValueError, match="payload: 101 bytes exceed 100"):
        prefill.source.offer([1], 1, bytes(101))


def test_progress_copies_no_more_than_it_may(prefill: SourceSide, decode: SinkSide) -> None:
    ticket = prefill.source.offer([0, 1, 5], 40)
    decode.sink.post(1, ticket, 0, [0, 1, 5])
    for num_words in (25, 50, 75, 100, 125, 150, 175):
        assert decode.sink.progress(100)
        assert np.count_nonzero(decode.blocks) == num_words
        assert decode.sink.completions() == [] and prefill.source.ended() == []
    assert not decode.sink.progress(100)
    assert [c.error for c in decode.sink.completions()] == [""]
    assert np.array_equal(decode.blocks[[0, 1, 5]], prefill.blocks[[0, 1, 5]])


def test_a_withdrawn_offer_is_not_fetched_and_its_slot_serves_the_next(
    prefill: SourceSide, decode: SinkSide
) -> None:
    tickets = [prefill.source.offer([i], 1) for i in range(3)]
    with pytest.raises(NoFreeSlot, match="all 3 slots"):
        prefill.source.offer([5], 1)
    prefill.source.withdraw([tickets[1].serial, 99, tickets[1].serial])
    assert prefill.source.ended() == [tickets[1].serial]
    assert f"ended serial {tickets[1].serial}" in decode.fetch(tickets[1], [0])
    again = prefill.source.offer([6], 1)
    assert again.slot == tickets[1].slot and again.serial == 4
    assert "holds serial 4" in decode.fetch(tickets[1], [0])
    assert not decode.blocks.any()
    assert decode.fetch(again, [0]) == ""
    assert prefill.source.counters.offers_withdrawn == 1
    prefill.source.withdraw_all()
    assert sorted(prefill.source.ended()) == [1, 3, 4]
    assert prefill.source.num_standing == 0


def test_an_offer_withdrawn_in_mid_copy_fails_the_fetch(prefill: SourceSide, decode: SinkSide) -> None:
    ticket = prefill.source.offer([0, 2, 4], 40)
    decode.sink.post(1, ticket, 0, [0, 1, 2])
    assert decode.sink.progress(BLOCK_BYTES)
    prefill.source.withdraw([ticket.serial])
    prefill.blocks[:] = 77
    assert not decode.sink.progress(BLOCK_BYTES)
    assert "ended serial 1" in decode.sink.completions()[0].error
    assert 77 not in decode.blocks
    assert decode.sink.counters.blocks_fetched == 0


def test_an_offer_withdrawn_under_the_last_copy_fails_the_fetch(
    prefill: SourceSide, decode: SinkSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = prefill.source.offer([0], 1)
    copy = _native.copy

    def slow_copy(*args: object) -> None:
        prefill.source.withdraw([ticket.serial])
        prefill.blocks[:] = 77
        copy(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(_native, "copy", slow_copy)
    assert "ended serial 1" in decode.fetch(ticket, [0])
    assert prefill.source.counters.offers_withdrawn == 1 and prefill.source.ended() == [1]


def test_a_cancelled_fetch_writes_nothing_more_and_others_go_on(
    prefill: SourceSide, decode: SinkSide
) -> None:
    first, second = prefill.source.offer([0, 2], 32), prefill.source.offer([4], 1)
    decode.sink.post(1, first, 0, [0, 1])
    decode.sink.post(2, second, 0, [2])
    decode.sink.post(2, second, 0, [3])  # again: ignored
    assert decode.sink.progress(BLOCK_BYTES)
    decode.sink.cancel(1)
    decode.sink.cancel(1)
    before = decode.blocks.copy()
    assert not decode.sink.progress(1 << 20)
    assert [(c.fetch_id, c.error) for c in decode.sink.completions()] == [(1, "cancelled"), (2, "")]
    assert np.array_equal(decode.blocks[:2], before[:2])
    assert decode.blocks[2, 0] == 5 and decode.blocks[3, 0] == 0
    assert prefill.source.ended() == [second.serial], "a cancelled fetch leaves its offer standing"
    assert decode.fetch(first, [0, 1], fetch_id=3) == ""


def test_serials_wrap_and_skip_what_stands(pod: str, decode: SinkSide) -> None:
    side = SourceSide(pod, first_serial=SERIAL_MAX - 1)
    tickets = [side.source.offer([0], 1) for _ in range(3)]
    assert [t.serial for t in tickets] == [SERIAL_MAX - 1, SERIAL_MAX, 1]
    assert [decode.fetch(t, [0]) for t in tickets] == [""] * 3
    assert sorted(side.source.ended()) == [1, SERIAL_MAX - 1, SERIAL_MAX]
    side.close()


def test_sources_take_turns_and_one_that_is_wrong_touches_no_other(pod: str, decode: SinkSide) -> None:
    sides = [SourceSide(pod, index=index) for index in range(3)]
    tickets = [side.source.offer([0, 2], 32) for side in sides]
    for index, ticket in enumerate(tickets):
        decode.sink.post(index, ticket, 0, [2 * index, 2 * index + 1])
    assert all(decode.sink.progress(BLOCK_BYTES) for _ in range(3))
    assert decode.blocks[:6, 0].tolist() == [1, 0, 1, 0, 1, 0], "each had a turn"
    sides[1].source.withdraw_all()
    assert not decode.sink.progress(1 << 20)
    errors = {c.fetch_id: c.error for c in decode.sink.completions()}
    assert errors[0] == errors[2] == "" and "prefill-1.1" in errors[1]
    for side in sides:
        side.close()


def test_two_sinks_of_one_source_are_counted_apart(prefill: SourceSide) -> None:
    sinks = [SinkSide(index=index) for index in range(2)]
    first, second = prefill.source.offer([0], 1), prefill.source.offer([1, 2], 32)
    assert sinks[1].fetch(second, [0, 1]) == ""
    assert prefill.source.ended() == [second.serial]
    assert sinks[0].fetch(first, [0]) == ""
    assert prefill.source.ended() == [first.serial]
    assert [side.sink.counters.blocks_fetched for side in sinks] == [1, 2]
    assert prefill.source.counters.blocks_sent == 3
    for side in sinks:
        side.close()


def test_a_new_incarnation_of_a_sink_continues_its_row(prefill: SourceSide, decode: SinkSide) -> None:
    assert decode.fetch(prefill.source.offer([0], 1), [0]) == ""
    assert prefill.source.ended() == [1]
    successor = SinkSide(incarnation=2)
    for serial in (2, 3, 4):
        assert successor.fetch(prefill.source.offer([serial], 1), [serial]) == ""
        assert prefill.source.ended() == [serial]
    successor.close()


# ------------------------------------------------------------------ death


def test_what_a_dead_source_had_offered_may_still_be_fetched(prefill: SourceSide, decode: SinkSide) -> None:
    mapped, unmapped = prefill.source.offer([0], 1), prefill.source.offer([1], 1)
    decode.sink.post(1, mapped, 0, [0])
    prefill.segment.close()
    assert not decode.sink.progress(1 << 20)
    assert [c.error for c in decode.sink.completions()] == [""]
    prefill.segment.unlink()
    assert decode.fetch(unmapped, [1], fetch_id=2) == ""
    decode.sink.drop_dead()
    assert decode.sink.num_mapped == 0
    assert decode.blocks[:2, 0].tolist() == [1, 2]


def test_a_segment_that_is_gone_fails_the_fetch(prefill: SourceSide, decode: SinkSide) -> None:
    ticket = prefill.source.offer([0], 1)
    prefill.segment.unlink()
    assert "segment is gone" in decode.fetch(ticket, [0])


def test_a_newer_incarnation_replaces_the_mapping_when_its_fetches_are_over(
    pod: str, prefill: SourceSide, decode: SinkSide
) -> None:
    old = prefill.source.offer([0], 1)
    decode.sink.post(1, old, 0, [0])
    new = SourceSide(pod, incarnation=2)
    new.blocks[:] = 9
    decode.sink.post(2, new.source.offer([0], 1), 0, [1])
    assert decode.sink.num_mapped == 2
    assert not decode.sink.progress(1 << 20)
    assert decode.sink.num_mapped == 1
    assert [c.error for c in decode.sink.completions()] == ["", ""]
    assert decode.blocks[:2, 0].tolist() == [1, 9]
    assert decode.fetch(prefill.source.offer([2], 1), [2], fetch_id=3) == "", "a late ticket of the old one"
    assert decode.sink.num_mapped == 1
    decode.sink.drop_dead()
    assert decode.sink.num_mapped == 1, "it lives"
    new.close()


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("block_ids", "num_tokens", "text"),
    [
        ([], 1, "0 blocks must be 1..8"),
        ([8], 1, "must be in 0..7"),
        ([-1], 1, "must be in 0..7"),
        ([0] * 9, 1, "9 blocks must be 1..8"),
        ([0], 0, "num_tokens: 0"),
        ([0], 1 << 32, "num_tokens"),
    ],
)
def test_impossible_offers_are_refused(
    prefill: SourceSide, block_ids: list[int], num_tokens: int, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        prefill.source.offer(block_ids, num_tokens)
    assert prefill.source.num_standing == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"slot": 3}, "does not exist"),
        ({"slot": -1}, "does not exist"),
        ({"slot": 1}, "has no offer"),
        ({"serial": 2}, "holds serial 1"),
        ({"serial": 0}, "holds serial 1"),
        ({"serial": -1}, "holds serial 1"),
        ({"serial": 1 << 70}, "holds serial 1"),
        ({"num_tokens": 33}, "other blocks than the ticket"),
        ({"num_tokens": -1}, "other blocks than the ticket"),
        ({"block_ids": (0, 2)}, "other blocks than the ticket"),
        ({"block_ids": (1, 0)}, "other blocks than the ticket"),
        ({"block_ids": (0, 8)}, "must be in 0..7"),
        ({"block_ids": (0, -1)}, "must be in 0..7"),
        ({"block_ids": (0, 1 << 40)}, "must be in 0..7"),
        ({"incarnation": 2}, "belongs to prefill-0.1"),
        ({"index": 1}, "belongs to prefill-0.1"),
        ({"segment": "/xds-nobody-prefill-0-1"}, "segment is gone"),
        ({"segment": "../../etc/passwd"}, "segment is gone"),
    ],
)
def test_a_ticket_that_contradicts_the_table_is_refused(
    prefill: SourceSide, decode: SinkSide, changes: dict[str, object], text: str
) -> None:
    ticket = prefill.source.offer([0, 1], 32)
    assert text in decode.fetch(msgspec.structs.replace(ticket, **changes), [0, 1])
    assert not decode.blocks.any()
    assert decode.fetch(ticket, [0, 1], fetch_id=2) == "", "the offer stands as it did"


@pytest.mark.parametrize(
    ("first_block", "block_ids", "text"),
    [
        (0, [0], "1 blocks for 2"),
        (0, [0, 1, 2], "3 blocks for 2"),
        (1, [0, 1], "2 blocks for 2"),
        (3, [], "first_block: 3"),
        (-1, [0, 1, 2], "first_block: -1"),
        (0, [0, 8], "must be in 0..7"),
        (0, [-1, 0], "must be in 0..7"),
    ],
)
def test_an_impossible_fetch_is_refused(
    prefill: SourceSide, decode: SinkSide, first_block: int, block_ids: list[int], text: str
) -> None:
    ticket = prefill.source.offer([0, 1], 32)
    assert text in decode.fetch(ticket, block_ids, first_block=first_block)
    assert not decode.blocks.any()


def test_sides_that_disagree_about_blocks_or_sinks_do_not_talk(prefill: SourceSide) -> None:
    ticket = prefill.source.offer([0], 1)
    for side, text in (
        (SinkSide(block_bytes=128), "its blocks have 256"),
        (SinkSide(index=2), "has 2 sinks"),
    ):
        assert text in side.fetch(ticket, [0])
        assert side.sink.num_mapped == 0
        side.close()


def test_a_segment_without_a_table_is_refused(prefill: SourceSide, decode: SinkSide) -> None:
    ticket = prefill.source.offer([0], 1)
    trailer = prefill.segment.layout.app_offset + LAYOUT.trailer_offset
    for offset, text in ((0, "magic"), (8, "version"), (12, "app area"), (16, "app area"), (20, "app area")):
        word = _native.load_u32(prefill.segment.buf, trailer + offset)
        _native.store_u32(prefill.segment.buf, trailer + offset, word + 1)
        assert text in decode.fetch(ticket, [0])
        _native.store_u32(prefill.segment.buf, trailer + offset, word)
    assert decode.fetch(ticket, [0]) == ""


def test_an_answer_that_cannot_be_ends_nothing(prefill: SourceSide) -> None:
    ticket = prefill.source.offer([0, 1], 32)
    base, buf = prefill.segment.layout.app_offset, prefill.segment.buf
    for stamp, (num_blocks, num_bytes) in enumerate([(3, 3 * BLOCK_BYTES), (1, 5), (1 << 63, 1 << 63)], 1):
        _native.write_cell(
            buf, base + LAYOUT.done_offset(1, ticket.slot), stamp, ticket.serial, num_blocks, num_bytes
        )
        _native.store_u64(buf, base + LAYOUT.news_offset(1), stamp)
        assert prefill.source.ended() == []
        assert prefill.source.counters.corrupt_answers == stamp
    assert prefill.source.counters.bytes_sent == 0 and prefill.source.num_standing == 1
    prefill.source.withdraw([ticket.serial])
    assert prefill.source.ended() == [ticket.serial]


def test_an_answer_to_an_earlier_offer_of_the_slot_ends_nothing(prefill: SourceSide) -> None:
    old = prefill.source.offer([0], 1)
    prefill.source.withdraw_all()
    assert prefill.source.ended() == [1]
    tickets = [prefill.source.offer([0], 1) for _ in range(3)]
    assert tickets[2].slot == old.slot
    base, buf = prefill.segment.layout.app_offset, prefill.segment.buf
    _native.write_cell(buf, base + LAYOUT.done_offset(0, old.slot), 7, old.serial, 1, BLOCK_BYTES)
    _native.store_u64(buf, base + LAYOUT.news_offset(0), 7)
    assert prefill.source.ended() == [] and prefill.source.num_standing == 3


def test_layouts_are_checked(prefill: SourceSide) -> None:
    for field, value in (
        ("num_blocks", 0),
        ("block_bytes", 0),
        ("block_bytes", 6),
        ("num_slots", 0),
        ("num_sinks", 0),
        ("payload_bytes_max", -1),
        ("block_bytes", 1 << 40),
    ):
        sizes = {"num_blocks": 8, "block_bytes": 8, "num_slots": 2, "num_sinks": 1, "payload_bytes_max": 0}
        with pytest.raises(ValueError, match=r"app_bytes|" + field):
            TransferLayout(**{**sizes, field: value})
    with pytest.raises(ValueError, match="must be the app area's"):
        KvSource(prefill.segment, TransferLayout(8, 4096, 3, 2))
    with pytest.raises(ValueError, match="first_serial"):
        KvSource(prefill.segment, LAYOUT, first_serial=0)


def test_parts_of_the_table_do_not_overlap() -> None:
    layout = TransferLayout(num_blocks=5, block_bytes=12, num_slots=7, num_sinks=3, payload_bytes_max=33)
    parts = [(0, layout.kv_bytes), (layout.trailer_offset, 64)]
    parts += [(layout.offer_offset(slot), 64) for slot in range(7)]
    parts += [(layout.news_offset(sink), 8) for sink in range(3)]
    parts += [(layout.done_offset(sink, slot), DONE_BYTES) for sink in range(3) for slot in range(7)]
    parts += [(layout.payload_offset(slot), 33) for slot in range(7)]
    taken = np.zeros(layout.app_bytes, np.int8)
    for start, num_bytes in parts:
        assert start + num_bytes <= layout.app_bytes
        taken[start : start + num_bytes] += 1
    assert taken.max() == 1


def test_a_sink_needs_room_for_its_blocks() -> None:
    with pytest.raises(ValueError, match="hold no 9 blocks"):
        KvSink(bytearray(8), num_blocks=9, block_bytes=4, index=0, incarnation=1, rank="attention-0")


def test_every_source_and_sink_of_a_mesh_are_a_pair_of_their_own(pod: str) -> None:
    layout = TransferLayout(num_blocks=8, block_bytes=BLOCK_BYTES, num_slots=8, num_sinks=3)
    sources = [SourceSide(pod, index=index, layout=layout) for index in range(4)]
    sinks = [SinkSide(index=index) for index in range(3)]
    for i, prefill in enumerate(sources):
        prefill.blocks[:] = 10 * i + np.arange(8)[:, None]
        for decode in sinks:
            decode.sink.post(i, prefill.source.offer([2, 5], 32), 0, [2 * i, 2 * i + 1])
    while sum(decode.sink.progress(BLOCK_BYTES) for decode in sinks):
        pass
    for decode in sinks:
        assert [c.error for c in decode.sink.completions()] == [""] * 4
        assert decode.blocks[:, 0].tolist() == [2, 5, 12, 15, 22, 25, 32, 35]
        assert decode.sink.num_mapped == 4
        decode.close()
    for prefill in sources:
        assert sorted(prefill.source.ended()) == [1, 2, 3]
        assert prefill.source.counters.blocks_sent == 6
        prefill.close()
