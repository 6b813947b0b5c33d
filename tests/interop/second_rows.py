"""Rows of the second implementation: float32, and INT8 with a scale each, after bus/README.md, "Dispatch and combine".

A float32 row is an `array("f")`; an INT8 row is an `array("b")` with its scale. Products and sums are made in double
and rounded to float32 after each step, which gives what float32 arithmetic gives (53 bits are more than 2 * 24 + 2).
"""

from __future__ import annotations

import math
import struct
from array import array
from dataclasses import dataclass

Row = array  # of "f", or of "b"


@dataclass
class Int8Row:
    """int8 values and the scale that they count in."""

    q: Row
    scale: float


def rounded(value: float) -> float:
    """Return the float32 nearest to `value`."""
    return array("f", [value])[0]


def quantise(row: Row) -> Int8Row:
    """Return the INT8 form of a float32 row."""
    if not all(map(math.isfinite, row)):
        return Int8Row(array("b", bytes(len(row))), math.nan)
    scale = rounded(max(map(abs, row), default=0.0) / 127)
    if scale == 0:
        return Int8Row(array("b", bytes(len(row))), 0.0)
    return Int8Row(array("b", (round(max(-127.0, min(127.0, rounded(v / scale)))) for v in row)), scale)


def dequantise(row: Int8Row) -> Row:
    """Return the float32 values of an INT8 row."""
    return array("f", [value * row.scale for value in row.q])


@dataclass(frozen=True)
class Rows:
    """Rows of `hidden` at `base` of a segment's bytes; those of INT8 have their scales at `scales`."""

    view: memoryview
    base: int
    scales: int
    hidden: int
    is_int8: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.hidden if self.is_int8 else 4 * self.hidden

    def put(self, index: int, row: Row | Int8Row) -> None:
        """Store a row, rounded to INT8 if it is not yet."""
        if self.is_int8:
            row = row if isinstance(row, Int8Row) else quantise(row)
            struct.pack_into("=f", self.view, self.scales + 4 * index, row.scale)
            row = row.q
        assert not isinstance(row, Int8Row)
        at = self.base + index * self.row_bytes
        self.view[at : at + self.row_bytes] = row.tobytes()

    def get(self, index: int) -> Row | Int8Row:
        """Return a row as it travels."""
        at = self.base + index * self.row_bytes
        data = bytes(self.view[at : at + self.row_bytes])
        if not self.is_int8:
            return array("f", data)
        scale: float = struct.unpack_from("=f", self.view, self.scales + 4 * index)[0]
        return Int8Row(array("b", data), scale)

    def widened(self, index: int) -> Row:
        """Return a row as float32."""
        row = self.get(index)
        return dequantise(row) if isinstance(row, Int8Row) else row
