"""Headers say what array follows, and no 128 bytes make the receiver crash or allocate without bound."""

from __future__ import annotations

import contextlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bus.xccl.message import HEADER_BYTES, MessageHeader

DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(),
    npst.unsigned_integer_dtypes(),
    npst.floating_dtypes(sizes=(16, 32, 64)),
    npst.complex_number_dtypes(sizes=(64, 128)),
)


@given(DTYPES, npst.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3))
def test_a_header_round_trips(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> None:
    header = MessageHeader.of(np.zeros(shape, dtype))
    data = header.pack()
    assert len(data) == HEADER_BYTES
    assert MessageHeader.parse(data, 1 << 30) == header


@given(DTYPES, st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_still_describes_the_announced_bytes(
    dtype: np.dtype[np.generic], at: int, flip: int
) -> None:
    header = MessageHeader.of(np.zeros((2, 3), dtype))
    data = bytearray(header.pack())
    data[at] ^= flip
    with contextlib.suppress(ValueError):
        assert MessageHeader.parse(bytes(data), 1 << 20).num_bytes == header.num_bytes


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_arbitrary_bytes_never_exceed_the_bound(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert MessageHeader.parse(data, 4096).num_bytes <= 4096
