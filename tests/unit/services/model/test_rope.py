"""Rotary angles."""

from __future__ import annotations

import numpy as np

from services.model.config import RopeConfig
from services.model.rope import CHUNK_POSITIONS, RopeTable, attention_factor, inverse_frequencies


def test_default_frequencies() -> None:
    expected = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(inverse_frequencies(RopeConfig(dim=16, theta=10000.0)), expected, rtol=1e-6)


def test_linear_stretches_all_and_yarn_the_slow_pairs_only() -> None:
    plain = inverse_frequencies(RopeConfig(dim=64, theta=10000.0))
    linear = inverse_frequencies(RopeConfig(dim=64, theta=10000.0, kind="linear", factor=4.0))
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    rope = RopeConfig(dim=64, theta=10000.0, kind="yarn", factor=4.0, original_max_position_embeddings=4096)
    yarn = inverse_frequencies(rope)
    np.testing.assert_array_equal(yarn[:8], plain[:8])
    np.testing.assert_allclose(yarn[-6:], plain[-6:] / 4, rtol=1e-6)
    assert (np.diff(yarn) < 0).all()


def test_llama3_stretches_what_turns_rarely() -> None:
    plain = inverse_frequencies(RopeConfig(dim=64, theta=5e5))
    rope = RopeConfig(dim=64, theta=5e5, kind="llama3", factor=8.0, original_max_position_embeddings=8192)
    llama = inverse_frequencies(rope)
    wavelengths = 2 * np.pi / plain
    fast, slow = wavelengths < 8192 / 4, wavelengths > 8192
    np.testing.assert_array_equal(llama[fast], plain[fast])
    np.testing.assert_allclose(llama[slow], plain[slow] / 8, rtol=1e-6)
    between = ~fast & ~slow
    assert between.any()
    assert (llama[between] < plain[between]).all() and (llama[between] > plain[between] / 8).all()
    assert (np.diff(llama) < 0).all()


def test_attention_factors() -> None:
    def yarn(**changes: float) -> RopeConfig:
        return RopeConfig(
            dim=8, theta=1e4, kind="yarn", factor=40.0, original_max_position_embeddings=4096, **changes
        )

    assert attention_factor(RopeConfig(dim=8, theta=1e4)) == 1.0
    assert attention_factor(yarn(attention_factor=1.5)) == 1.5
    assert attention_factor(yarn(mscale=1.0, mscale_all_dim=1.0)) == 1.0
    np.testing.assert_allclose(attention_factor(yarn()), 0.1 * np.log(40.0) + 1.0)


def test_a_positions_angles_do_not_depend_on_what_was_asked_before() -> None:
    rope = RopeConfig(dim=32, theta=10000.0)
    positions = np.array(
        [0, 5, CHUNK_POSITIONS - 1, CHUNK_POSITIONS, 3 * CHUNK_POSITIONS + 7], dtype=np.int32
    )
    cos, sin = RopeTable(rope).rows(positions)
    table = RopeTable(rope)
    for row, position in enumerate(positions):
        alone = table.rows(positions[row : row + 1])
        assert alone[0].tobytes() == cos[row].tobytes()
        assert alone[1].tobytes() == sin[row].tobytes()
        np.testing.assert_allclose(cos[row, 0], np.cos(float(position)), atol=1e-6)
    assert table.rows(np.empty(0, dtype=np.int32))[0].shape == (0, 16)
