"""What a point-to-point message carries: an array, or several parts, each announced in its first record.

The tag, 40 bytes, fills up the line of the first record of every part, so that the header of a small message
costs no line of its own:

    record 24       28         29      30         32                64
    +------+--------+----------+-------+----------+-----------------+
    | ...  | dtype  | ndim u8  | kind  | num_more | shape: 4 x u64  |
    |      | char[4]|          | u8    | u16      | unused = 0      |
    +------+--------+----------+-------+----------+-----------------+

Arrays of 5 to 8 dimensions have the others in the first 64 bytes of that record's payload (the extension: 8 x
u64, unused = 0). Kinds:

    INLINE  the bytes follow, in this record and the next ones
    PULL    they lie in the sender's app area; the payload is their offset in its segment, u64, alone (8 bytes) or in
            40 bytes as under READ
    PUT     the sender has stored them in the receiver's app area; the payload is their offset there, u64
    READ    they lie in the sender's memory; the payload is their address, u64, and the state of the offer, u32, either
            alone (16 bytes) or with the words by which both ends share the copy (40 bytes)
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bus.errors import Truncated

TAG: Final = struct.Struct("=4sBBH4Q")
TAG_BYTES: Final = 40
EXTENSION: Final = struct.Struct("=8Q")
EXTENSION_BYTES: Final = 64
POINTER: Final = struct.Struct("=Q")
OFFER: Final = struct.Struct("=QI4x")
SHARED_OFFER_BYTES: Final = 40
OFFER_STATE: Final = 8
OFFERED, TAKEN, WITHDRAWN = 0, 1, 2
TAG_DIMS: Final = 4
NUM_DIMS_MAX: Final = 8
NUM_PARTS_MAX: Final = 65535
SLOT_BYTES_MIN: Final = 128
INLINE: Final = 1
PULL: Final = 2
PUT: Final = 3
READ: Final = 4
DTYPE_PATTERN: Final = re.compile(r"[<>|=][biufc][0-9]{1,2}")

if (TAG.size, EXTENSION.size) != (TAG_BYTES, EXTENSION_BYTES):
    raise AssertionError("tag or extension has not its size")


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
    """dtype and shape of the array that a part carries, how it travels, and how many parts follow."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    kind: int = INLINE
    num_more: int = 0

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> MessageHeader:
        """Return the header of a message that carries `array`."""
        return cls(array.dtype, array.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pack(self) -> tuple[bytes, bytes]:
        """Return the tag, and the extension (empty up to 4 dimensions)."""
        dims = (*self.shape, *[0] * (TAG_DIMS + 8 - len(self.shape)))
        name = self.dtype.str.encode("ascii")
        tag = TAG.pack(name, len(self.shape), self.kind, self.num_more, *dims[:TAG_DIMS])
        return tag, EXTENSION.pack(*dims[TAG_DIMS:]) if len(self.shape) > TAG_DIMS else b""

    @classmethod
    def parse(cls, tag: bytes, extension: bytes, num_bytes_max: int) -> MessageHeader:
        """Return what a tag and its extension say; ValueError names the first field that is wrong.

        Args:
            tag: 40 bytes.
            extension: the first bytes of the payload, used only for 5 dimensions and more.
            num_bytes_max: bound of the array's bytes.
        """
        if len(tag) != TAG_BYTES:
            raise ValueError(f"tag: {len(tag)} bytes must be {TAG_BYTES}")
        raw_name, ndim, kind, num_more, *dims = TAG.unpack(tag)
        if ndim > NUM_DIMS_MAX:
            raise ValueError(f"shape: {ndim} dimensions are more than {NUM_DIMS_MAX}")
        if ndim > TAG_DIMS:
            if len(extension) < EXTENSION_BYTES:
                raise ValueError(f"extension: {len(extension)} bytes must be {EXTENSION_BYTES}")
            dims += EXTENSION.unpack(extension[:EXTENSION_BYTES])
        if any(dims[ndim:]):
            raise ValueError(f"shape: {ndim} dimensions of {dims}")
        if kind not in (INLINE, PULL, PUT, READ):
            raise ValueError(f"kind: {kind} must be one of {INLINE}, {PULL}, {PUT}, {READ}")
        name = raw_name.rstrip(b"\0").decode("ascii", "replace")
        if not DTYPE_PATTERN.fullmatch(name):
            raise ValueError(f"dtype: {name!r} must match {DTYPE_PATTERN.pattern}")
        try:
            header = cls(np.dtype(name), tuple(dims[:ndim]), kind, num_more)
        except TypeError as error:
            raise ValueError(f"dtype: {name!r} is unknown") from error
        # The product of the non-zero lengths counts too: NumPy refuses shapes that overflow, even when empty.
        extent = math.prod(length for length in header.shape if length) * header.dtype.itemsize
        if header.num_bytes > num_bytes_max or extent > 2**63 - 1:
            raise ValueError(
                f"num_bytes: {header.num_bytes} of {header.dtype} {header.shape} > {num_bytes_max}"
            )
        return header


def check_out(out: npt.NDArray[Any], header: MessageHeader, *, rank: str, peer: str, event_id: int) -> None:
    """Raise Truncated if the message has more bytes than `out`, ValueError if dtype or shape differ."""
    check_array(out)
    if header.num_bytes > out.nbytes:
        text = f"the message has {header.num_bytes} bytes, the buffer {out.nbytes}"
        raise Truncated(text, rank=rank, peer=peer, event_id=event_id)
    if (out.dtype, out.shape) != (header.dtype, header.shape):
        raise ValueError(f"out: {out.dtype} {out.shape} must be the message's {header.dtype} {header.shape}")
