"""The KV cache's layout and the batch's checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bus.errors import ConfigError
from services.model import Batch, KvCache, KvSpec, load_config
from tests.conftest import GOLDENS

GQA = KvSpec(num_layers=3, num_kv_heads=2, k_dim=4, v_dim=4, v_view_dim=0)
MLA = KvSpec(num_layers=3, num_kv_heads=1, k_dim=10, v_dim=0, v_view_dim=8)
MLA_INT8 = KvSpec(num_layers=3, num_kv_heads=1, k_dim=13, v_dim=0, v_view_dim=9, is_int8=True)


@pytest.mark.parametrize(("spec", "bytes_per_token"), [(GQA, 3 * 2 * 8 * 4), (MLA, 3 * 10 * 4)])
def test_every_float_belongs_to_one_slot(spec: KvSpec, bytes_per_token: int) -> None:
    assert spec.bytes_per_token == bytes_per_token
    buffer = bytearray(5 * 2 * bytes_per_token)
    kv = KvCache(spec, 5, 2, buffer)
    for layer in range(3):
        kv.k(layer)[...] += 1.0
        if not spec.v_view_dim:
            kv.v(layer)[...] += 1.0
    assert (np.frombuffer(buffer, dtype=np.float32) == 1.0).all()


def test_a_block_is_contiguous_and_latent_values_are_a_view_of_the_keys() -> None:
    buffer = bytearray(5 * 2 * MLA.bytes_per_token)
    kv = KvCache(MLA, 5, 2, buffer)
    for layer in range(3):
        kv.k(layer)[3] = 7.0
    block_bytes = 2 * MLA.bytes_per_token
    values = np.frombuffer(buffer, dtype=np.float32)
    assert np.flatnonzero(values).tolist() == list(range(3 * block_bytes // 4, 4 * block_bytes // 4))
    assert kv.v(1).shape == (5, 2, 1, 8)
    assert np.shares_memory(kv.v(1), kv.k(1))


def test_an_int8_row_is_the_latent_padded_to_4_bytes_a_scale_and_the_rotated_part() -> None:
    row_bytes = 12 + 4 + 4 * 4
    assert (MLA_INT8.bytes_per_token_layer, MLA_INT8.bytes_per_token) == (row_bytes, 3 * row_bytes)
    buffer = bytearray(5 * 2 * 3 * row_bytes)
    kv = KvCache(MLA_INT8, 5, 2, buffer)
    for layer in range(3):
        assert kv.latent_rows(layer).shape == (5, 2, row_bytes)
        kv.latent_rows(layer)[...] += np.uint8(layer + 1)
        kv.latent_rows(layer)[3] += np.uint8(7)
    whole = np.frombuffer(buffer, np.uint8).reshape(5, 3, 2 * row_bytes)
    for layer in range(3):
        assert (whole[:, layer] == layer + 1 + 7 * (np.arange(5) == 3)[:, None]).all()


def test_bytes_per_token_of_a_model() -> None:
    config = load_config(GOLDENS / "deepseek_v3")  # latents of 20, rotated parts of 8, 3 layers
    assert KvSpec.of(config).bytes_per_token == 3 * 4 * 28
    assert KvSpec.of(config, "int8").bytes_per_token == 3 * (20 + 4 + 4 * 8)


def test_what_cannot_be_int8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype = 'int8': needs latent .* qwen3_moe has grouped"):
        KvSpec.of(load_config(GOLDENS / "qwen3_moe"), "int8")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype = 'fp8': must be one of auto, int8"):
        KvSpec.of(load_config(GOLDENS / "deepseek_v3"), "fp8")


def test_wrong_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="must be writable"):
        KvCache(GQA, 5, 2, bytes(5 * 2 * GQA.bytes_per_token))
    with pytest.raises(ValueError, match="hold 1920 bytes"):
        KvCache(GQA, 5, 2, bytearray(1919))
    with pytest.raises(ValueError, match="must be positive"):
        KvCache(GQA, 0, 2)


def test_batches_are_checked() -> None:
    good: dict[str, Any] = {
        "token_ids": np.zeros(3, dtype=np.int64),
        "positions": np.zeros(3, dtype=np.int32),
        "seq_of_row": np.zeros(3, dtype=np.int32),
        "block_tables": np.zeros((1, 2), dtype=np.int32),
        "block_tokens": 4,
    }
    assert Batch(**good).num_rows == 3
    for name, wrong in {
        "token_ids": np.zeros(3, dtype=np.int32),
        "positions": np.zeros(2, dtype=np.int32),
        "seq_of_row": np.zeros(3, dtype=np.int64),
        "block_tables": np.zeros(2, dtype=np.int32),
        "block_tokens": 0,
    }.items():
        with pytest.raises(ValueError, match=name):
            Batch(**(good | {name: wrong}))
