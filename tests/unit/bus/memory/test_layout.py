from __future__ import annotations

import pytest

from bus.memory.layout import (
    AREAS_OFFSET,
    CELL_STRIDE_BYTES,
    HEADER_BYTES,
    LAYOUT_VERSION,
    PAGE_BYTES,
    SegmentIdentity,
    SegmentLayout,
    pack_identity,
    parse_header,
)


def header_of(layout: SegmentLayout, identity: SegmentIdentity) -> bytearray:
    header = bytearray(512)
    first = pack_identity(identity, layout)
    header[: len(first)] = first
    areas = layout.pack_areas()
    header[AREAS_OFFSET : AREAS_OFFSET + len(areas)] = areas
    return header


IDENTITY = SegmentIdentity("expert", 3, 17)


@pytest.mark.parametrize(
    "layout",
    [
        SegmentLayout(0, 0, 0),
        SegmentLayout(1, 1, 1),
        SegmentLayout(64, 4096, 0),
        SegmentLayout(66, 5, 9000, 3),
    ],
)
def test_areas_are_page_aligned_in_order_and_large_enough(layout: SegmentLayout) -> None:
    offsets = [layout.cells_offset, layout.managed_offset, layout.app_offset, layout.total_bytes]
    assert offsets == sorted(offsets)
    assert all(offset % PAGE_BYTES == 0 for offset in offsets)
    assert layout.cells_offset == HEADER_BYTES
    assert layout.managed_offset >= layout.cells_offset + layout.num_cells * CELL_STRIDE_BYTES
    assert layout.app_offset - layout.managed_offset >= layout.managed_bytes
    assert layout.total_bytes - layout.app_offset >= layout.app_bytes


def test_cells_of_all_peers_and_lanes_are_distinct_lines_of_the_metadata_area() -> None:
    layout = SegmentLayout(12, 100, 0, num_lanes=3)
    offsets = [layout.cell_offset(peer, lane) for peer in range(4) for lane in range(3)]
    assert offsets == [HEADER_BYTES + 64 * i for i in range(12)]
    assert offsets[-1] + 64 <= layout.managed_offset


@pytest.mark.parametrize(("peer", "lane"), [(-1, 0), (4, 0), (0, 3), (0, -1)])
def test_a_cell_outside_the_area_is_refused(peer: int, lane: int) -> None:
    with pytest.raises(IndexError, match="cell"):
        SegmentLayout(12, 0, 0, num_lanes=3).cell_offset(peer, lane)


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ((-1, 0, 0, 1), "num_cells"),
        ((2**21, 0, 0, 1), "num_cells"),
        ((0, -1, 0, 1), "managed_bytes"),
        ((0, 0, 2**41, 1), "app_bytes"),
        ((0, 0, 0, 0), "num_lanes"),
        ((5, 0, 0, 2), "num_cells"),
    ],
)
def test_bad_sizes_are_refused_by_name(args: tuple[int, int, int, int], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        SegmentLayout(*args)


@pytest.mark.parametrize(
    ("service", "index", "incarnation"),
    [("", 0, 1), ("x" * 17, 0, 1), ("é", 0, 1), ("a", -1, 1), ("a", 2**32, 1), ("a", 0, 0), ("a", 0, 2**64)],
)
def test_bad_identities_are_refused(service: str, index: int, incarnation: int) -> None:
    with pytest.raises(ValueError, match=r"service|index|incarnation"):
        SegmentIdentity(service, index, incarnation)


def test_a_header_says_what_was_packed() -> None:
    layout = SegmentLayout(12, 100, 7, num_lanes=3)
    assert parse_header(bytes(header_of(layout, IDENTITY))) == (IDENTITY, layout)


@pytest.mark.parametrize("offset", [0, 8, 12, 36, *range(AREAS_OFFSET, AREAS_OFFSET + 56, 8)])
def test_every_changed_field_of_the_header_is_noticed(offset: int) -> None:
    header = header_of(SegmentLayout(12, 10000, 10000, num_lanes=3), IDENTITY)
    header[offset + 2] ^= 0x40
    with pytest.raises(ValueError, match=r"magic|version|header|num_|areas|bytes"):
        parse_header(bytes(header))


def test_another_layout_version_is_named() -> None:
    header = header_of(SegmentLayout(0, 0, 0), IDENTITY)
    header[8] = LAYOUT_VERSION + 1
    with pytest.raises(ValueError, match=f"version: {LAYOUT_VERSION + 1} must be {LAYOUT_VERSION}"):
        parse_header(bytes(header))


def test_a_short_header_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        parse_header(bytes(40))
