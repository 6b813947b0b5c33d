"""KV transfer between the library and a second implementation, written from bus/README.md; either is either side."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import numpy as np
import pytest

from bus.control.messages import KvTicket
from bus.memory.segment import segment_name, segment_prefix, sweep, total_bytes
from tests.harness.transfer_world import BLOCK_BYTES, LAYOUT, SinkSide, SourceSide
from tests.interop import second
from tests.interop.second_transfer import Sink, Sizes, Source, Ticket, Withdrawn

pytestmark = pytest.mark.skipif(not second.SOUND, reason="plain accesses order nothing here: see second.py")
SIZES = Sizes(slots=3, sinks=2, blocks=9, block_bytes=BLOCK_BYTES, payload_max=70)


@pytest.fixture
def pod() -> Iterator[str]:
    name = f"unit{uuid.uuid4().hex[:12]}"
    yield name
    sweep(segment_prefix(name))
    assert total_bytes(segment_prefix(name)) == 0


def block_of(value: int) -> bytes:
    return np.full(BLOCK_BYTES // 4, value, np.uint32).tobytes()


def test_their_sink_fetches_from_our_source(pod: str) -> None:
    ours = SourceSide(pod)
    theirs = Sink(ours.segment.name, index=1, incarnation=3)
    assert (theirs.table.sizes.payloads, theirs.table.sizes.trailer) == (
        LAYOUT.payloads_offset,
        LAYOUT.trailer_offset,
    )
    for count in range(1, 7):
        offered = ours.source.offer([count, 0, 7], 40 + count, bytes(range(count)))
        ticket = Ticket(offered.slot, offered.serial, offered.num_tokens, offered.block_ids)
        blocks, payload = theirs.fetch(ticket, first_block=count % 2)
        assert blocks == [block_of(block + 1) for block in (count, 0, 7)][count % 2 :]
        assert payload == bytes(range(count))
        assert ours.source.ended() == [offered.serial]
        with pytest.raises(Withdrawn):
            theirs.fetch(ticket)
    assert ours.source.counters.blocks_sent == 3 * 6 - 3
    assert ours.source.counters.corrupt_answers == 0
    theirs.table.segment.close()
    ours.close()


def test_our_sink_fetches_from_their_source(pod: str) -> None:
    name = segment_name(pod, "prefill", 4, 2)
    theirs, ours = Source(name, SIZES, index=4, incarnation=2), SinkSide(index=1, incarnation=5)
    for block in range(SIZES.blocks):
        theirs.block(block)[:] = block_of(100 + block)
    for count in range(6):
        made = theirs.offer(count % 3, (8, 2, count), 33, b"x" * count)
        ticket = KvTicket(
            index=4,
            incarnation=2,
            segment=name,
            slot=made.slot,
            serial=made.serial,
            num_tokens=33,
            block_ids=made.block_ids,
        )
        ours.sink.post(count, ticket, 1, [0, 5])
        assert not ours.sink.progress(1 << 20)
        (completion,) = ours.sink.completions()
        assert (completion.error, completion.payload) == ("", b"x" * count)
        assert ours.blocks[[0, 5], 3].tolist() == [102, 100 + count]
        assert theirs.fetched(0) == {} and theirs.fetched(1) == {made.serial: 2}
        assert "ended serial" in ours.fetch(ticket, [0, 1, 2], fetch_id=99)
    ours.close()
    theirs.segment.close()
