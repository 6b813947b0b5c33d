from __future__ import annotations

import pytest

from bus.errors import SegmentCorrupt
from bus.memory import _native
from bus.memory.ring import HEAD_OFFSET, SLOTS_OFFSET, TAIL_OFFSET, Consumer, Producer, RingLayout

LAYOUT = RingLayout(num_slots=4, slot_bytes=100)


@pytest.fixture
def region() -> memoryview:
    return memoryview(bytearray(LAYOUT.total_bytes))


def put(producer: Producer, payload: bytes, **tags: int) -> bool:
    slot = producer.try_claim()
    if slot is None:
        return False
    slot[: len(payload)] = payload
    producer.commit(len(payload), **tags)
    return True


def take(consumer: Consumer) -> bytes | None:
    record = consumer.peek()
    if record is None:
        return None
    payload = bytes(record.payload)
    consumer.release()
    return payload


def test_records_arrive_in_order_with_their_tags(region: memoryview) -> None:
    producer, consumer = Producer(region, LAYOUT), Consumer(region, LAYOUT)
    assert put(producer, b"one", event_id=2**64 - 1, chunk_id=2**32 - 1)
    assert put(producer, b"")
    record = consumer.peek()
    assert record is not None
    assert (bytes(record.payload), record.event_id, record.chunk_id) == (b"one", 2**64 - 1, 2**32 - 1)
    consumer.release()
    assert take(consumer) == b""
    assert take(consumer) is None


def test_a_claimed_slot_is_invisible_until_commit_and_after_abort(region: memoryview) -> None:
    producer, consumer = Producer(region, LAYOUT), Consumer(region, LAYOUT)
    slot = producer.try_claim()
    assert slot is not None
    slot[:4] = b"lost"
    assert consumer.peek() is None
    producer.abort()
    assert consumer.peek() is None
    assert put(producer, b"kept")
    assert take(consumer) == b"kept"


def test_a_full_ring_is_backpressure(region: memoryview) -> None:
    producer, consumer = Producer(region, LAYOUT), Consumer(region, LAYOUT)
    assert [put(producer, bytes([i])) for i in range(6)] == [True] * 4 + [False] * 2
    assert take(consumer) == b"\0"
    assert put(producer, b"\4")
    assert producer.try_claim() is None
    assert [take(consumer) for _ in range(5)] == [b"\1", b"\2", b"\3", b"\4", None]


def test_an_unpublished_release_frees_nothing_yet(region: memoryview) -> None:
    producer, consumer = Producer(region, LAYOUT), Consumer(region, LAYOUT)
    for i in range(4):
        put(producer, bytes([i]))
    consumer.peek()
    consumer.release(publish=False)
    assert producer.try_claim() is None
    consumer.release()
    assert [put(producer, b"x") for _ in range(3)] == [True, True, False]


def test_new_ends_go_on_where_the_old_ones_were(region: memoryview) -> None:
    for i in range(10):
        assert put(Producer(region, LAYOUT), bytes([i]))
        assert take(Consumer(region, LAYOUT)) == bytes([i])


def test_misuse_of_claims_is_an_error(region: memoryview) -> None:
    producer, consumer = Producer(region, LAYOUT), Consumer(region, LAYOUT)
    for misuse in (producer.abort, lambda: producer.commit(0), consumer.release):
        with pytest.raises(RuntimeError):
            misuse()
    producer.try_claim()
    with pytest.raises(RuntimeError):
        producer.try_claim()
    with pytest.raises(ValueError, match="num_bytes: 101"):
        producer.commit(101)
    assert consumer.peek() is None
    producer.commit(100)
    record = consumer.peek()
    assert record is not None
    assert len(record.payload) == 100


@pytest.mark.parametrize(("offset", "value"), [(TAIL_OFFSET, 5), (TAIL_OFFSET, 2**64 - 1), (HEAD_OFFSET, 1)])
def test_positions_that_contradict_each_other_are_corrupt(
    region: memoryview, offset: int, value: int
) -> None:
    consumer = Consumer(region, LAYOUT, rank="expert-0", peer="attention-1")
    _native.store_u64(region, offset, value)
    for broken in (lambda: Producer(region, LAYOUT), lambda: Consumer(region, LAYOUT)):
        with pytest.raises(SegmentCorrupt, match="tail"):
            broken()
    if offset == TAIL_OFFSET:
        with pytest.raises(SegmentCorrupt, match="rank expert-0, peer attention-1"):
            consumer.peek()


@pytest.mark.parametrize("head", [2, 0, 7])
def test_a_head_that_falls_or_overtakes_is_corrupt(region: memoryview, head: int) -> None:
    producer, consumer = Producer(region, LAYOUT), Consumer(region, LAYOUT)
    for _ in range(3):
        put(producer, b"")
        take(consumer)
    producer = Producer(region, LAYOUT)
    for _ in range(4):
        assert put(producer, b"")
    _native.store_u64(region, HEAD_OFFSET, head if head != 7 else 8)
    with pytest.raises(SegmentCorrupt, match="head"):
        producer.try_claim()


@pytest.mark.parametrize(("at", "field"), [(0, "position"), (8, "101 bytes")])
def test_a_damaged_record_is_corrupt_and_stays(region: memoryview, at: int, field: str) -> None:
    producer, consumer = Producer(region, LAYOUT), Consumer(region, LAYOUT)
    put(producer, b"abc")
    region[SLOTS_OFFSET + at] = 101
    for _ in range(2):
        with pytest.raises(SegmentCorrupt, match=field):
            consumer.peek()


@pytest.mark.parametrize(
    ("num_slots", "slot_bytes", "field"),
    [(0, 1, "num_slots"), (2**20 + 1, 1, "num_slots"), (1, 0, "slot_bytes"), (1, 2**30 + 1, "slot_bytes")],
)
def test_bad_geometry_is_refused_by_name(num_slots: int, slot_bytes: int, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        RingLayout(num_slots, slot_bytes)


def test_a_region_that_is_too_small_is_refused(region: memoryview) -> None:
    with pytest.raises(ValueError, match="region"):
        Producer(region[:-1], LAYOUT)
