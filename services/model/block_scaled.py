"""Matrices stored as 8-bit floats with one factor per block, as DeepSeek, Kimi, Qwen and MiniMax ship them.

An element is e4m3 (sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, 0x7f and 0xff are NaN) times the
float32 factor of its block. `numerics` multiplies with it as it lies; the product equals, to the bit, that with the
matrix written out in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class BlockScaled:
    """A matrix [N, K].

    Args:
        values: [N, K] uint8, the bits of e4m3.
        scale: [ceil(N / block_rows), ceil(K / block_columns)] float32.
        block_rows, block_columns: size of a block; the last ones may be smaller.
    """

    values: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float32]
    block_rows: int
    block_columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, K)."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Return the bytes of values and factors."""
        return self.values.nbytes + self.scale.nbytes


def scale_shape(shape: tuple[int, ...], block_rows: int, block_columns: int) -> tuple[int, int]:
    """Return the shape of the factors of a matrix."""
    rows, columns = shape
    return -(-rows // block_rows), -(-columns // block_columns)
