"""Any bytes in a segment's header: attaching raises what it should, or yields a segment that fits its file."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.errors import SegmentCorrupt
from bus.memory.layout import READY_OFFSET, SegmentLayout
from bus.memory.segment import Segment, segment_name

LAYOUT = SegmentLayout(6, 5000, 300, num_lanes=3)
# magic, version, header bytes, service, index, num_lanes, incarnation, then the seven areas
FIELDS = [
    (0, 8),
    (8, 4),
    (12, 4),
    (16, 16),
    (32, 4),
    (36, 4),
    (40, 8),
    *[(at, 8) for at in range(64, 120, 8)],
]
EDGES = [
    0,
    1,
    2,
    3,
    6,
    63,
    64,
    4095,
    4096,
    4097,
    300,
    5000,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


@pytest.fixture(scope="module")
def owned() -> Iterator[Segment]:
    pod = f"fuzz{uuid.uuid4().hex[:12]}"
    segment = Segment.create(
        segment_name(pod, "expert", 0, 1), LAYOUT, service="expert", index=0, incarnation=1
    )
    yield segment
    segment.unlink()
    segment.close()


@st.composite
def edits(draw: st.DrawFn) -> tuple[int, bytes]:
    """Bytes for a field, or anywhere in the header."""
    if draw(st.booleans()):
        at, size = draw(st.sampled_from(FIELDS))
        return at, (draw(st.sampled_from(EDGES)) & (1 << 8 * size) - 1).to_bytes(size, "little")
    return draw(st.integers(0, READY_OFFSET + 3)), draw(st.binary(min_size=1, max_size=8))


@settings(max_examples=400, deadline=None)
@given(st.lists(edits(), min_size=1, max_size=4))
def test_any_header_is_refused_or_fits(owned: Segment, changes: list[tuple[int, bytes]]) -> None:
    good = owned.buf[: READY_OFFSET + 8]
    for at, content in changes:
        owned.buf[at : at + len(content)] = content
    try:
        peer = Segment.attach(owned.name)
    except (SegmentCorrupt, FileNotFoundError):
        pass
    else:
        assert peer.layout.total_bytes == len(peer.buf) == LAYOUT.total_bytes
        assert len(peer.managed) == peer.layout.managed_bytes
        assert len(peer.app) == peer.layout.app_bytes
        last = peer.layout.num_cells - 1
        if last >= 0:
            peer.cell_offset(last // peer.layout.num_lanes, last % peer.layout.num_lanes)
        peer.close()
    finally:
        owned.buf[: READY_OFFSET + 8] = good
