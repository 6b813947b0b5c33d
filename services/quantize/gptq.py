"""Rounding a weight matrix to INT8 so that its outputs, not its entries, stay close (GPTQ). Pure.

Theory. For inputs X [n, K] the error of a row w rounded to v is |X (w - v)|^2 = (w - v)' H (w - v) with H = X' X. The
columns are rounded one after the other; what column k loses is made up for by the columns after it, as well as they
can: with U the upper Cholesky factor of H^-1, column j > k moves by -(w_k - v_k) / U[k, k] * U[k, j]. Columns with much
energy in X go first, while there are many left to make up for them. Rows do not touch each other. Whole blocks of
columns are brought up to date at once, which changes nothing but speed.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022; paper
section 4.5.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.model.int8 import Q_MAX, Int8Matrix

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
BLOCK_COLUMNS = 64


def round_to_nearest(w: Float) -> Int8Matrix:
    """Return w [N, K] with every entry rounded by itself; scale = max|row| / 127. Raises ValueError: not finite."""
    scale = _row_scales(w)
    return Int8Matrix(_to_grid(w, scale), scale)


def gptq(w: Float, hessian: Double, *, damping: float = 0.01) -> Int8Matrix:
    """Return w [N, K] rounded with error compensation; scales as `round_to_nearest`.

    Args:
        w: [N, K] float32.
        hessian: [K, K] float64, sum of x x' over calibration rows; left as it is.
        damping: added to the diagonal, as a part of its mean, so that inputs never seen leave their columns alone.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, damping is not positive.
    """
    num_columns = w.shape[1]
    if hessian.shape != (num_columns, num_columns) or not np.isfinite(hessian).all():
        raise ValueError(f"hessian {list(hessian.shape)} must be finite and [{num_columns}, {num_columns}]")
    if damping <= 0:
        raise ValueError(f"damping {damping} must be positive")
    scale = _row_scales(w)
    order = np.argsort(-np.diag(hessian), kind="stable")
    factor = _inverse_factor(hessian[np.ix_(order, order)], damping)
    left = w[:, order].astype(np.float64)
    q = np.empty(w.shape, np.int8)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, num_columns)
        errors = np.empty((w.shape[0], end - start))
        for k in range(start, end):
            q[:, k] = _to_grid(left[:, k : k + 1], scale)[:, 0]
            errors[:, k - start] = (left[:, k] - q[:, k] * scale.astype(np.float64)) / factor[k, k]
            left[:, k + 1 : end] -= np.outer(errors[:, k - start], factor[k, k + 1 : end])
        left[:, end:] -= errors @ factor[start:end, end:]
    restored = np.empty_like(q)
    restored[:, order] = q
    return Int8Matrix(restored, scale)


def output_error(w: Float, rounded: Int8Matrix, hessian: Double) -> float:
    """Return |X (w - rounded)'|^2 / |X w'|^2 for the rows X behind `hessian`; 0 when X w' is zero."""
    wide = w.astype(np.float64)
    lost = wide - rounded.widen()
    energy = float(np.einsum("nk,kj,nj->", wide, hessian, wide, optimize=True))
    return float(np.einsum("nk,kj,nj->", lost, hessian, lost, optimize=True)) / energy if energy > 0 else 0.0


def _row_scales(w: Float) -> Float:
    if w.ndim != 2 or not np.isfinite(w).all():
        raise ValueError(f"w {list(w.shape)} must be a matrix of finite numbers")
    return np.asarray(np.abs(w).max(axis=1, initial=0) / np.float32(Q_MAX), np.float32)


def _to_grid(w: npt.NDArray[np.floating], scale: Float) -> npt.NDArray[np.int8]:
    divisor = np.where(scale > 0, scale, 1)[:, None]
    return np.clip(np.rint(w / divisor), -Q_MAX, Q_MAX).astype(np.int8)


def _inverse_factor(hessian: Double, damping: float) -> Double:
    """Return U with U' U = (hessian + damping)^-1, upper triangular."""
    diagonal = np.diag(hessian)
    floor = damping * float(diagonal.mean()) or 1.0
    damped = hessian + np.diag(np.full(len(hessian), floor))
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T)
