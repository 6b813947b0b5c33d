"""The INT8 cache of latent attention: its rows, its attention, and one rounding for cache, activations and wire."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bus.xccl import int8 as transport
from services.model import KvCache, KvSpec, _kernels, numerics
from services.model import numerics_reference as twin
from services.model.int8 import quantise_rows

Float = npt.NDArray[np.float32]
ROPE = 6
RANKS = (1, 7, 8, 20, 64)


@pytest.fixture(params=("generic", "avx2"))
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _kernels.instruction_set()
    try:
        _kernels.select_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"{request.param} is not available on this machine")
    yield
    _kernels.select_instruction_set(before)


def empty_cache(rank: int, num_blocks: int, block_tokens: int) -> npt.NDArray[np.uint8]:
    """The middle layer of three: its blocks do not follow one another in memory."""
    kv = KvCache(KvSpec(3, 1, rank + ROPE, 0, rank, is_int8=True), num_blocks, block_tokens)
    kv.array.fill(np.nan)
    return kv.latent_rows(1)


def case(rank: int) -> tuple[Float, dict[str, Any]]:
    """Rows of two sequences in one batch, and where they are."""
    rng = np.random.default_rng(rank)
    x = rng.standard_normal((17, rank + ROPE), dtype=np.float32) * rng.random((17, 1), dtype=np.float32)
    x[3, :rank] = 0
    return x, {
        "block_tables": np.array([[5, 0, 6], [2, 8, -1]], dtype=np.int32),
        "seq_of_row": np.repeat(np.arange(2, dtype=np.int32), [11, 6]),
        "positions": np.concatenate([np.arange(11, dtype=np.int32), np.arange(6, dtype=np.int32)]),
    }


@pytest.mark.parametrize("rank", RANKS)
def test_rows_are_stored_as_the_twin_says_and_nothing_else_is_written(rank: int) -> None:
    x, where = case(rank)
    cache = empty_cache(rank, 9, 4)
    expected = cache.copy()
    numerics.latent_store(x, rank, cache, **where)
    for row, seq, position in zip(x, where["seq_of_row"], where["positions"], strict=True):
        expected[where["block_tables"][seq, position // 4], position % 4] = twin.latent_row(row, rank)
    assert cache.tobytes() == expected.tobytes()


@pytest.mark.parametrize("num_heads", [1, 3, 40])
@pytest.mark.parametrize("rank", RANKS)
def test_attention_has_the_bits_of_the_rows_written_out(
    instruction_set: None, rank: int, num_heads: int
) -> None:
    x, where = case(rank)
    cache = empty_cache(rank, 9, 4)
    numerics.latent_store(x, rank, cache, **where)
    q = np.random.default_rng(1).standard_normal((17, num_heads, rank + ROPE), dtype=np.float32)
    out = numerics.latent_attention(q, rank, cache, **where, scale=0.25)
    k = twin.latent_rows(cache, rank)
    assert out.tobytes() == numerics.paged_attention(q, k, k[..., :rank], **where, scale=0.25).tobytes()
    np.testing.assert_allclose(
        out, twin.paged_attention(q, k, k[..., :rank], **where, scale=0.25), rtol=1e-5, atol=2e-6
    )
    for row in range(17):
        alone = {name: where[name][row : row + 1] for name in ("seq_of_row", "positions")}
        one = numerics.latent_attention(q[row : row + 1], rank, cache, **(where | alone), scale=0.25)
        assert one.tobytes() == out[row].tobytes()


def test_a_row_that_is_not_finite_testifies() -> None:
    x, where = case(8)
    x[4, 2], x[5, 3] = np.inf, np.nan
    cache = empty_cache(8, 9, 4)
    numerics.latent_store(x, 8, cache, **where)
    rows = twin.latent_rows(cache, 8)[where["block_tables"][0], :, 0].reshape(12, -1)
    assert np.isnan(rows[4:6, :8]).all()
    assert np.isfinite(rows[[*range(4), *range(6, 11)]]).all()


def test_errors_name_the_argument() -> None:
    x, where = case(8)
    cache, q = empty_cache(8, 9, 4), np.zeros((17, 2, 14), np.float32)
    for wrong, said in (
        (lambda: numerics.latent_store(x, 7, cache, **where), "latent_store: cache must have extent 40"),
        (lambda: numerics.latent_store(x, 0, cache, **where), "latent_store: rank 0 must be in 1..14"),
        (lambda: numerics.latent_store(x, 15, cache, **where), "latent_store: rank 15 must be in 1..14"),
        (
            lambda: numerics.latent_store(x, 8, cache.view(np.int8), **where),  # type: ignore[arg-type]
            "latent_store: cache must be uint8",
        ),
        (
            lambda: numerics.latent_store(x, 8, cache[:6], **where),
            "latent_store: sequence 0: block id 6 outside 0..5",
        ),
        (
            lambda: numerics.latent_attention(q, 8, cache[:, :1], **where, scale=1.0),
            "latent_attention: row 3: sequence 0, position 3 outside the block tables",
        ),
        (
            lambda: numerics.latent_attention(q, 20, cache, **where, scale=1.0),
            "latent_attention: rank 20 must be in 1..14",
        ),
        (
            lambda: numerics.latent_attention(q[:, :0], 8, cache, **where, scale=1.0),
            "latent_attention: q must have heads",
        ),
    ):
        with pytest.raises(ValueError, match=said.replace("..", r"\.\.")):
            wrong()


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 40)),
        elements=st.floats(width=32) | st.floats(-(2.0**-142), 2.0**-142, width=32) | st.integers(-9, 9),
    )
)
def test_cache_products_and_wire_round_alike(x: Float) -> None:
    q, scale = quantise_rows(x)
    sent, sent_scale = transport.quantise(x)
    assert np.array_equal(q, sent) and np.array_equal(scale, sent_scale, equal_nan=True)
    for row, numbers, factor in zip(x, q, scale, strict=True):
        rank = len(row)
        cache = empty_cache(rank, 1, 1)
        zero = np.zeros(1, np.int32)
        numerics.latent_store(
            np.append(row, np.ones(ROPE, np.float32))[None], rank, cache, zero[None], zero, zero
        )
        assert cache[0, 0, :rank].tobytes() == numbers.tobytes()
        kept = cache[0, 0, -(-rank // 4) * 4 :].copy().view(np.float32)
        assert np.array_equal(kept, np.append(factor, np.ones(ROPE)), equal_nan=True)
