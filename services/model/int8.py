"""INT8 matrices: whole numbers with one scale per row, and the products with them (paper section 4.5).

    weight row n     w[n] ~ q[n] * scale[n]                     fixed by `xds quantize`
    activation row   x[m] ~ round(x[m] / s[m]) * s[m]           s[m] = max|x[m]| / 127, found for each row as it comes
    product          (sum over k of the whole numbers, exact) * (s[m] * scale[n])

Whole numbers add up to the same sum in every order, so a row's bits depend on that row alone and are the same on every
instruction set. The arithmetic is in `_int8.c`; `numerics` calls it when a weight is an `Int8Matrix`. Twins:
`numerics_reference.int8_matmul_nt`, `int8_mlp`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.model import _int8

Float = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
Q_MAX = 127


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """A weight [N, K] in INT8 with per-row scales.

    q: [N, K] int8 in -127 .. 127, rows contiguous; may be a view of a mapped file.
    scale: [N] float32, finite and not negative.
    """

    q: Int8
    scale: Float

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, K)."""
        return self.q.shape

    @property
    def nbytes(self) -> int:
        """Return the bytes of numbers and scales."""
        return self.q.nbytes + self.scale.nbytes

    def rows(self, start: int, end: int) -> Int8Matrix:
        """Return rows start .. end, a view."""
        return Int8Matrix(self.q[start:end], self.scale[start:end])

    def widen(self) -> Float:
        """Return q * scale as a new float32 array [N, K]."""
        return self.q.astype(np.float32) * self.scale[:, None]


def matmul_nt(x: Float, w: Int8Matrix, out: Float) -> Float:
    """Fill out [M, N] with x [M, K] @ w.T; x is quantised row by row. A row with NaN or inf gives NaN."""
    _int8.matmul_nt(x, w.q, w.scale, out)
    return out


def mlp(x: Float, gate: Int8Matrix, up: Int8Matrix, down: Int8Matrix, out: Float) -> Float:
    """Fill out [M, H] with the gated MLP of x [M, H]; what enters `down` is quantised row by row too."""
    _int8.mlp(x, gate.q, gate.scale, up.q, up.scale, down.q, down.scale, out)
    return out


def quantise_rows(x: Float) -> tuple[Int8, Float]:
    """Return (q [M, K] int8, scale [M] float32) of rows x [M, K], half to even; NaN or inf makes a scale NaN."""
    q, scale = np.empty(x.shape, np.int8), np.empty(len(x), np.float32)
    _int8.quantise_rows(x, q, scale)
    return q, scale
