"""Smoothing: products stay, outliers move."""

from __future__ import annotations

import numpy as np
import pytest

from services.model import numerics_reference as twin
from services.quantize.gptq import round_to_nearest
from services.quantize.smooth import channel_maxima, smoothing


def test_products_do_not_change_and_outliers_shrink() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((50, 16), dtype=np.float32)
    x[:, 4] *= 100
    w = [rng.standard_normal((n, 16), dtype=np.float32) for n in (5, 9)]
    s = smoothing(channel_maxima(x), [channel_maxima(m) for m in w], 0.5)
    assert s[4] == s.max() and s.min() < s[4]
    for matrix in w:  # powers of two: to the bit, but for the order of nothing
        np.testing.assert_array_equal((x / s) * (matrix[0] * s), x * matrix[0])
    assert channel_maxima(x / s).max() < channel_maxima(x).max()


def test_rounded_products_come_closer() -> None:
    rng = np.random.default_rng(4)
    x, w = rng.standard_normal((200, 64), dtype=np.float32), rng.standard_normal((32, 64), dtype=np.float32)
    x[:, :3] *= 60

    def error(s: np.ndarray) -> float:
        rounded = round_to_nearest(w * s)
        return float(np.abs(twin.int8_matmul_nt(x / s, rounded.q, rounded.scale) - x @ w.T).mean())

    s = smoothing(channel_maxima(x), [channel_maxima(w)], 0.5)
    assert error(s) < 0.5 * error(np.ones(64, np.float32))


def test_silent_channels_are_left_alone() -> None:
    s = smoothing(np.array([0, 1, 1], np.float32), [np.array([1, 0, 1], np.float32)], 0.5)
    assert (s == 1).all()


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_strength_is_bounded(strength: float) -> None:
    with pytest.raises(ValueError, match="strength"):
        smoothing(np.ones(2, np.float32), [np.ones(2, np.float32)], strength)
