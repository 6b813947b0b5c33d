"""Rotary position embeddings: the angle of every position, as transformers computes it.

A table of cosines and sines grows in whole chunks of positions, and each chunk is always computed by the same
calls on the same shapes, so that a position's entries have the same bits whatever was asked for before.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from services.model.model_config import RopeConfig

CHUNK_POSITIONS = 1024

Float = npt.NDArray[np.float32]


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's growth of attention scores for a context stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(rope: RopeConfig) -> Float:
    """Return the angle per position of each of the dim / 2 pairs, [dim / 2] float32."""
    exponents = (np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)).astype(np.float64)
    periods = (rope.theta**exponents).astype(np.float32)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, periods)
    frequencies = (np.float32(1.0) / periods).astype(np.float32)
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, frequencies)
    return (frequencies / np.float32(rope.factor)).astype(np.float32)


def _llama3_frequencies(rope: RopeConfig, frequencies: Float) -> Float:
    """Stretch pairs that turn rarely in the original window, leave fast ones, blend in between."""
    original = rope.original_max_position_embeddings
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    wavelengths = np.float32(2 * math.pi) / frequencies
    stretched = frequencies / np.float32(rope.factor)
    blend = (np.float32(original) / wavelengths - low) / (high - low)
    blended = (np.float32(1.0) - blend) * stretched + blend * frequencies
    slow, fast = wavelengths > original / rope.low_freq_factor, wavelengths < original / rope.high_freq_factor
    result: Float = np.where(slow, stretched, np.where(fast, frequencies, blended)).astype(np.float32)
    return result


def _yarn_frequencies(rope: RopeConfig, periods: Float) -> Float:
    """Blend stretched and original frequencies: slow pairs are stretched, fast ones are left alone."""
    dim = rope.dim

    def pair_of(rotations: float) -> float:
        original = rope.original_max_position_embeddings
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    one = np.float32(1.0)
    pairs = np.arange(dim // 2, dtype=np.float32)
    stretched = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
    kept = one - stretched
    frequencies: Float = one / (np.float32(rope.factor) * periods) * (one - kept) + one / periods * kept
    return frequencies


def attention_factor(rope: RopeConfig) -> float:
    """Return the factor of cosines and sines."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


class RopeTable:
    """Cosines and sines by position, filled on demand up to the model's window."""

    def __init__(self, rope: RopeConfig) -> None:
        self._frequencies = inverse_frequencies(rope)
        self._factor = np.float32(attention_factor(rope))
        self._cos: Float = np.empty((0, rope.dim // 2), dtype=np.float32)
        self._sin: Float = np.empty((0, rope.dim // 2), dtype=np.float32)

    def rows(self, positions: npt.NDArray[np.int32]) -> tuple[Float, Float]:
        """Return (cos, sin), [T, dim / 2] each, for positions [T]."""
        if positions.size:
            self._grow(int(positions.max()) + 1)
        return self._cos[positions], self._sin[positions]

    def _grow(self, num_positions: int) -> None:
        while len(self._cos) < num_positions:
            start = len(self._cos)
            positions = np.arange(start, start + CHUNK_POSITIONS, dtype=np.float32)
            angles = (positions[:, None] * self._frequencies).astype(np.float64)
            cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            self._cos = np.concatenate([self._cos, cos * self._factor])
            self._sin = np.concatenate([self._sin, sin * self._factor])
