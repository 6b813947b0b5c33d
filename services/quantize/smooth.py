"""Moving outliers from activations to weights before rounding (SmoothQuant). Pure.

Theory. Activations are rounded row by row with one scale, so one large channel costs the others their precision.
Dividing channel j of x by s[j] and multiplying column j of every matrix that reads x by s[j] changes no product, and
s[j] = max|x[j]|^strength / max|w[j]|^(1 - strength) splits the difficulty between both. The division is folded into
what produces x, a norm's weight or the rows of the `up` matrix, so it costs nothing when the model runs.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
SCALE_MIN, SCALE_MAX = 2.0**-6, 2.0**6


def channel_maxima(rows: Float) -> Float:
    """Return max|x| of each column of rows [n, K]; zeros when n is 0."""
    return np.asarray(np.abs(rows).max(axis=0, initial=0), np.float32)


def smoothing(x_max: Float, w_max: Sequence[Float], strength: float) -> Float:
    """Return s [K], powers of two around 1, to divide the channels of x and to multiply the columns of each w.

    Args:
        x_max: [K], largest magnitude of each channel of x.
        w_max: [K] for each matrix that reads x, largest magnitude of its columns.
        strength: 0 = leave the activations alone, 1 = make all channels of x equally large.

    Powers of two, because multiplying by them loses no bit of a stored norm or weight.

    Raises:
        ValueError: strength is outside 0 .. 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} must be in 0 .. 1")
    weights = np.max(np.stack(w_max), axis=0).astype(np.float64)
    raw = np.power(np.maximum(x_max, 1e-12), strength) / np.power(np.maximum(weights, 1e-12), 1 - strength)
    usable = (x_max > 0) & (weights > 0)
    centre = np.exp(np.log(raw[usable]).mean()) if usable.any() else 1.0
    scales = np.where(usable, np.exp2(np.rint(np.log2(raw / centre))), 1.0)
    return np.clip(scales, SCALE_MIN, SCALE_MAX).astype(np.float32)
