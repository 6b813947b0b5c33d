"""INT8 transport: one scale per row (token), fused into the copies of the collectives.

    absmax = max |x|;  scale = absmax / 127 (float32);  q = round_half_even(x / scale);  x' = float32(q) * scale

A row of zeros, or one so small that its scale rounds to 0, becomes zeros. A row with a value that is not
finite comes out as NaN throughout: it testifies instead of passing for data. The error of an element is at
most scale / 2 plus rounding.
Source: paper section 3 (quantising dispatch). Twin: `bus.xccl.reference.quantise_rows`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bus.memory import _collectives

Float32Array = npt.NDArray[np.float32]
Int8Array = npt.NDArray[np.int8]


def quantise(x: Float32Array) -> tuple[Int8Array, Float32Array]:
    """Return (q, scale) of rows.

    Args:
        x: [num_rows, hidden] float32, C-contiguous; read only.

    Returns:
        q: [num_rows, hidden] int8 in -127..127. scale: [num_rows] float32.

    Raises:
        ValueError: `x` has another dtype, rank or memory order.
    """
    check_rows("x", x, np.dtype(np.float32))
    q, scale = np.empty(x.shape, np.int8), np.empty(x.shape[0], np.float32)
    _collectives.quantise(q, scale, x, *x.shape)
    return q, scale


def dequantise(q: Int8Array, scale: Float32Array) -> Float32Array:
    """Return [num_rows, hidden] float32 from what `quantise` made. Raises ValueError like `quantise`."""
    check_rows("q", q, np.dtype(np.int8))
    if scale.dtype != np.float32 or scale.shape != q.shape[:1] or not scale.flags.c_contiguous:
        raise ValueError(f"scale: {scale.dtype}{list(scale.shape)} must be float32[{q.shape[0]}], contiguous")
    x = np.empty(q.shape, np.float32)
    _collectives.dequantise(x, q, scale, *q.shape)
    return x


def check_rows(name: str, array: npt.NDArray[np.generic], dtype: np.dtype[np.generic]) -> None:
    """Raise ValueError unless `array` is a C-contiguous matrix of `dtype`."""
    if array.dtype != dtype or array.ndim != 2 or not array.flags.c_contiguous:
        text = f"{name}: {array.dtype}{list(array.shape)}"
        raise ValueError(f"{text} must be a C-contiguous {dtype}[rows, hidden]")
