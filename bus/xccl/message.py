"""The 128 bytes that begin a point-to-point message: what array follows.

0          8          12         16               32                            96        128
+----------+----------+----------+----------------+-----------------------------+---------+
| num_bytes| version  | ndim u32 | dtype, ASCII,  | shape: 8 x u64, unused = 0  | unused  |
| u64      | u32      |          | NUL-padded     |                             |         |
+----------+----------+----------+----------------+-----------------------------+---------+
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

HEADER: Final = struct.Struct("=QII16s8Q32x")
HEADER_BYTES: Final = 128
HEADER_VERSION: Final = 1
NUM_DIMS_MAX: Final = 8
DTYPE_PATTERN: Final = re.compile(r"[<>|=][biufc][0-9]{1,2}")

if HEADER.size != HEADER_BYTES:
    raise AssertionError("the message header is not 128 bytes")


def check_array(array: npt.NDArray[Any]) -> None:
    """Raise ValueError unless `array` can travel: C-contiguous, at most 8 dimensions, plain numbers."""
    if not array.flags.c_contiguous:
        raise ValueError(f"array: strides {array.strides} must be C-contiguous")
    if array.ndim > NUM_DIMS_MAX:
        raise ValueError(f"array: {array.ndim} dimensions are more than {NUM_DIMS_MAX}")
    if not DTYPE_PATTERN.fullmatch(array.dtype.str):
        raise ValueError(f"array: dtype {array.dtype} must match {DTYPE_PATTERN.pattern}")


@dataclass(frozen=True, slots=True)
class MessageHeader:
    """dtype and shape of the array that a message carries."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> MessageHeader:
        """Return the header of a message that carries `array`."""
        return cls(array.dtype, array.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pack(self) -> bytes:
        """Return the 128 bytes."""
        shape = (*self.shape, *[0] * (NUM_DIMS_MAX - len(self.shape)))
        name = self.dtype.str.encode("ascii")
        return HEADER.pack(self.num_bytes, HEADER_VERSION, len(self.shape), name, *shape)

    @classmethod
    def parse(cls, data: bytes, num_bytes_max: int) -> MessageHeader:
        """Return what `data` says; ValueError names the first field that is wrong."""
        if len(data) != HEADER_BYTES:
            raise ValueError(f"{len(data)} bytes must be {HEADER_BYTES}")
        num_bytes, version, ndim, raw_name, *dims = HEADER.unpack(data)
        if version != HEADER_VERSION:
            raise ValueError(f"version: {version} must be {HEADER_VERSION}")
        if ndim > NUM_DIMS_MAX or any(dims[ndim:]):
            raise ValueError(f"shape: {ndim} dimensions of {dims}")
        name = raw_name.rstrip(b"\0").decode("ascii", "replace")
        if not DTYPE_PATTERN.fullmatch(name):
            raise ValueError(f"dtype: {name!r} must match {DTYPE_PATTERN.pattern}")
        try:
            header = cls(np.dtype(name), tuple(dims[:ndim]))
        except TypeError as error:
            raise ValueError(f"dtype: {name!r} is unknown") from error
        if header.num_bytes != num_bytes or num_bytes > num_bytes_max:
            raise ValueError(f"num_bytes: {num_bytes} for {header}, at most {num_bytes_max}")
        return header
