"""Headers say what array follows, and no 128 bytes make the receiver crash or allocate without bound."""

from __future__ import annotations

import contextlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bus.xccl.message import EXTENSION_BYTES, TAG_BYTES, MessageHeader

DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(),
    npst.unsigned_integer_dtypes(),
    npst.floating_dtypes(sizes=(16, 32, 64)),
    npst.complex_number_dtypes(sizes=(64, 128)),
)


@given(DTYPES, npst.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3), st.integers(0, 65535))
def test_a_header_round_trips(dtype: np.dtype[np.generic], shape: tuple[int, ...], num_more: int) -> None:
    header = MessageHeader(dtype, shape, num_more=num_more)
    tag, extension = header.pack()
    assert (len(tag), len(extension)) == (TAG_BYTES, EXTENSION_BYTES if len(shape) > 4 else 0)
    assert MessageHeader.parse(tag, extension, 1 << 30) == header


@given(DTYPES, st.integers(0, TAG_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_announces_no_more_than_the_bound(
    dtype: np.dtype[np.generic], at: int, flip: int
) -> None:
    data = bytearray(MessageHeader(dtype, (2, 3)).pack()[0])
    data[at] ^= flip
    with contextlib.suppress(ValueError):
        assert MessageHeader.parse(bytes(data), b"", 1 << 20).num_bytes <= 1 << 20


@given(st.binary(max_size=2 * TAG_BYTES), st.binary(max_size=EXTENSION_BYTES + 1))
def test_arbitrary_bytes_never_exceed_the_bound(tag: bytes, extension: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert MessageHeader.parse(tag, extension, 4096).num_bytes <= 4096
