"""Each kernel against its slow twin, its independence of neighbours, and its refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from services.model import _kernels, numerics
from services.model import numerics_reference as twin
from services.model.block_scaled import BlockScaled, scale_shape

Array = npt.NDArray[Any]
RNG = np.random.default_rng(7)
WEIGHT_TYPES = ("float32", "float16", "bfloat16")
SHAPES = [(1, 1, 1), (1, 8, 8), (2, 7, 5), (3, 25, 33), (4, 24, 64), (5, 49, 100), (7, 3, 9), (33, 51, 72)]


def normal(*shape: int) -> npt.NDArray[np.float32]:
    return RNG.standard_normal(shape, dtype=np.float32)


def stored(weights: npt.NDArray[np.float32], kind: str) -> Array:
    if kind == "bfloat16":
        return (weights.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return weights.astype(kind)


@pytest.fixture(params=["generic", "avx2"], autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _kernels.instruction_set()
    try:
        _kernels.select_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"{request.param} is not available on this machine")
    yield request.param
    _kernels.select_instruction_set(before)


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_products_equal_their_twins(kind: str, rows: int, columns: int, depth: int) -> None:
    x = normal(rows, depth)
    wide, tall = stored(normal(columns, depth), kind), stored(normal(depth, columns), kind)
    np.testing.assert_allclose(numerics.matmul_nt(x, wide), twin.matmul_nt(x, wide), atol=2e-5)
    np.testing.assert_allclose(numerics.matmul_nn(x, tall), twin.matmul_nn(x, tall), atol=2e-5)


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_a_rows_bits_are_the_same_alone(kind: str, rows: int, columns: int, depth: int) -> None:
    x = normal(rows, depth)
    wide, tall = stored(normal(columns, depth), kind), stored(normal(depth, columns), kind)
    down = stored(normal(depth, columns), kind)
    functions: list[Callable[[Array], Array]] = [
        lambda x: numerics.matmul_nt(x, wide),
        lambda x: numerics.matmul_nn(x, tall),
        lambda x: numerics.mlp(x, wide, wide, down),
    ]
    for function in functions:
        together = function(x)
        alone = np.concatenate([function(x[i : i + 1].copy()) for i in range(rows)])
        assert together.tobytes() == alone.tobytes()


def test_a_columns_bits_are_the_same_alone() -> None:
    x, w = normal(6, 41), normal(50, 41)
    together = numerics.matmul_nt(x, w)
    alone = np.concatenate([numerics.matmul_nt(x, w[n : n + 1]) for n in range(50)], axis=1)
    assert together.tobytes() == alone.tobytes()


def test_batched_products_take_strided_views() -> None:
    x, w = normal(5, 3, 20), normal(3, 11, 14)
    out = np.zeros((5, 3, 30), dtype=np.float32)
    numerics.matmul_nn(x[:, :, 4:15].transpose(1, 0, 2), w, out[:, :, 2:16].transpose(1, 0, 2))
    expected = np.einsum("thk,hkn->thn", x[:, :, 4:15], w)
    np.testing.assert_allclose(out[:, :, 2:16], expected, atol=2e-5)
    assert not out[:, :, :2].any()
    assert not out[:, :, 16:].any()


def test_every_half_is_widened_exactly() -> None:
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    finite = np.isfinite(halves.view(np.float16))
    ones = np.ones((1, 1), dtype=np.float32)
    as_float16 = halves.view(np.float16)[finite][:, None]
    np.testing.assert_array_equal(
        numerics.matmul_nt(ones, as_float16)[0], as_float16[:, 0].astype(np.float32)
    )
    as_bfloat16 = halves[np.isfinite(numerics.widen(halves))][:, None]
    np.testing.assert_array_equal(numerics.matmul_nt(ones, as_bfloat16)[0], numerics.widen(as_bfloat16)[:, 0])


def block_scaled(rows: int, columns: int, block: tuple[int, int]) -> BlockScaled:
    """Random bytes of finite e4m3 and factors of both signs."""
    values = RNG.integers(0, 256, (rows, columns), dtype=np.uint8)
    values[(values & 0x7F) == 0x7F] = 0x38
    return BlockScaled(values, 0.01 * normal(*scale_shape((rows, columns), *block)), *block)


def test_every_e4m3_byte_is_widened_exactly() -> None:
    every = np.arange(256, dtype=np.uint8)[None]
    one = BlockScaled(every, np.ones((1, 1), dtype=np.float32), 1, 256)
    expected = twin.e4m3_values()
    np.testing.assert_array_equal(numerics.dense(one)[0], expected)
    finite = np.delete(expected, [0x7F, 0xFF])
    assert (finite.max(), finite[finite > 0].min()) == (448.0, 2.0**-9)
    assert np.signbit(numerics.dense(one)[0, 0x80])


@pytest.mark.parametrize("block", [(1, 1), (16, 12), (24, 8), (128, 128)])
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_block_scaled_products_have_the_bits_of_the_matrix_written_out(
    rows: int, columns: int, depth: int, block: tuple[int, int]
) -> None:
    x = normal(rows, depth)
    gate, up, down = (block_scaled(*shape, block) for shape in ((columns, depth),) * 2 + ((depth, columns),))
    written = [twin.dequantise(w) for w in (gate, up, down)]
    assert numerics.dense(gate).tobytes() == written[0].tobytes()
    assert numerics.matmul_nt(x, gate).tobytes() == numerics.matmul_nt(x, written[0]).tobytes()
    assert numerics.mlp(x, gate, up, down).tobytes() == numerics.mlp(x, *written).tobytes()
    mixed = numerics.mlp(x, written[0], up, written[2])
    assert mixed.tobytes() == numerics.mlp(x, *written).tobytes()
    np.testing.assert_allclose(numerics.matmul_nt(x, gate), twin.matmul_nt(x, gate), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "e4m3"])
def test_a_weight_that_is_not_finite_is_found_wherever_it_is(dtype: str) -> None:
    size = numerics.CHECK_ELEMENTS + 5
    bits = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16, "e4m3": np.uint8}[dtype]
    bad = {"float32": [0x7F800000, 0xFFC00000], "float16": [0x7C00, 0xFE00]}.get(dtype, [0x7F80, 0xFFC0])
    largest = {"float32": 0x7F7FFFFF, "float16": 0x7BFF, "bfloat16": 0x7F7F, "e4m3": 0x7E}[dtype]
    stored = np.full(size, largest, dtype=bits)
    as_stored = stored.view(dtype) if dtype in ("float32", "float16") else stored
    assert numerics.all_finite(as_stored)
    for index in (0, size - 1):
        for value in [0x7F, 0xFF] if dtype == "e4m3" else bad:
            stored[index] = value
            assert not numerics.all_finite(as_stored)
        stored[index] = largest


def test_row_operations_equal_their_twins() -> None:
    x, gate, weight = normal(6, 5, 27), 20 * normal(6, 27), normal(27)
    np.testing.assert_allclose(
        numerics.rms_norm(x, weight, 1e-5), twin.rms_norm(x, weight, 1e-5), rtol=3e-6, atol=1e-6
    )
    up = normal(6, 27)
    np.testing.assert_allclose(numerics.silu_mul(gate, up), twin.silu_mul(gate, up), rtol=1e-6, atol=1e-30)
    cos, sin = normal(6, 13), normal(6, 13)
    for interleaved in (False, True):
        np.testing.assert_allclose(
            numerics.rope(x[:, :, :26], cos, sin, interleaved=interleaved),
            twin.rope(x[:, :, :26], cos, sin, interleaved=interleaved),
            atol=1e-6,
        )


def test_exponentials_do_not_overflow() -> None:
    extreme = np.array([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]], dtype=np.float32)
    result = numerics.silu_mul(extreme, np.ones_like(extreme))
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result[0, 3:], np.maximum(extreme[0, 3:], 0.0), rtol=1e-6)
    assert np.abs(result[0, 1:3]).max() < 1e-30


def test_combine_adds_slots_in_order_and_the_shared_slot_whole() -> None:
    y, weights, residual = normal(4, 4, 19), normal(4, 3), normal(4, 19)
    np.testing.assert_allclose(
        numerics.combine(y, weights, residual), twin.combine(y, weights, residual), atol=1e-5
    )
    # 1e8 + 1 - 1e8 is 0 in slot order and 1 in another.
    y = np.array([[[1e8], [1.0], [-1e8]]], dtype=np.float32)
    ones = np.ones((1, 3), dtype=np.float32)
    assert numerics.combine(y, ones, np.zeros((1, 1), dtype=np.float32))[0, 0] == 0.0


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("sigmoid", [True, False])
def test_router_equals_its_twin(n_group: int, topk_group: int, normalise: bool, sigmoid: bool) -> None:
    settings: dict[str, Any] = {
        "top_k": 4,
        "correction_bias": 0.3 * normal(12) if sigmoid else None,
        "n_group": n_group,
        "topk_group": topk_group,
        "norm_topk_prob": normalise,
        "routed_scaling_factor": 2.5,
    }
    logits = normal(50, 12)
    expected_idx, expected_weights = twin.route(logits, **settings)
    topk_idx, topk_weights = numerics.route(logits.copy(), **settings)
    np.testing.assert_array_equal(topk_idx, expected_idx)
    np.testing.assert_allclose(topk_weights, expected_weights, rtol=2e-6)


def test_router_prefers_the_lower_id_on_a_tie() -> None:
    for bias in (None, np.zeros(8, dtype=np.float32)):
        topk_idx, _ = numerics.route(
            np.zeros((1, 8), dtype=np.float32),
            top_k=3,
            correction_bias=bias,
            n_group=2,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
        )
        assert topk_idx.tolist() == [[0, 1, 2]]


def attention_case(num_heads: int, kv_heads: int) -> dict[str, Any]:
    """Three sequences over scattered blocks; unused cache is NaN and must not be touched."""
    lengths = [1, 9, 14]
    tables = np.full((3, 5), -1, dtype=np.int32)
    cache = np.full((9, 4, kv_heads, 21), np.nan, dtype=np.float32)
    free = [int(block) for block in np.random.default_rng(3).permutation(9)]
    for seq, length in enumerate(lengths):
        for index in range(-(-length // 4)):
            block = tables[seq, index] = free.pop()
            used = min(4, length - 4 * index)
            cache[block, :used] = normal(used, kv_heads, 21)
    seqs = np.repeat(np.arange(3, dtype=np.int32), lengths)
    return {
        "q": normal(sum(lengths), num_heads, 21),
        "k": cache,
        "v": cache[..., :16],
        "block_tables": tables,
        "seq_of_row": seqs,
        "positions": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
    }


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(1, 1), (4, 2), (6, 1), (20, 1), (3, 3)])
def test_paged_attention_equals_its_twin_and_rows_are_independent(num_heads: int, kv_heads: int) -> None:
    case = attention_case(num_heads, kv_heads)
    result = numerics.paged_attention(**case, scale=0.25)
    np.testing.assert_allclose(result, twin.paged_attention(**case, scale=0.25), atol=2e-6)
    for row in range(len(result)):
        alone = {name: case[name][row : row + 1].copy() for name in ("q", "seq_of_row", "positions")}
        assert numerics.paged_attention(**(case | alone), scale=0.25).tobytes() == result[row].tobytes()


def test_kv_store_writes_only_its_slots() -> None:
    cache = np.zeros((4, 2, 3, 5), dtype=np.float32)
    x = normal(2, 3, 5)
    where = (
        np.array([[3, 1]], dtype=np.int32),
        np.zeros(2, dtype=np.int32),
        np.array([2, 1], dtype=np.int32),
    )
    numerics.kv_store(x, cache, *where)
    np.testing.assert_array_equal(cache[1, 0], x[0])
    np.testing.assert_array_equal(cache[3, 1], x[1])
    assert np.count_nonzero(cache) == x.size


@pytest.mark.parametrize("block", [-1, 4])
def test_block_ids_outside_the_cache_are_refused(block: int) -> None:
    cache = np.zeros((4, 2, 1, 5), dtype=np.float32)
    where = (np.array([[block]], dtype=np.int32), np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32))
    with pytest.raises(ValueError, match=f"block id {block} outside"):
        numerics.kv_store(normal(1, 1, 5), cache, *where)
    with pytest.raises(ValueError, match=f"block id {block} outside"):
        numerics.paged_attention(normal(1, 1, 5), cache, cache, *where, scale=1.0)


def test_positions_outside_the_tables_are_refused() -> None:
    cache = np.zeros((4, 2, 1, 5), dtype=np.float32)
    table = np.zeros((1, 1), dtype=np.int32)
    for seq, position in ((0, 2), (1, 0), (0, -1), (-1, 0)):
        where = (table, np.array([seq], dtype=np.int32), np.array([position], dtype=np.int32))
        with pytest.raises(ValueError, match="outside the block tables"):
            numerics.paged_attention(normal(1, 1, 5), cache, cache, *where, scale=1.0)


def test_blocks_without_tokens_are_refused() -> None:
    cache, where = np.zeros((4, 0, 1, 5), np.float32), [np.zeros(shape, np.int32) for shape in ((1, 1), 1, 1)]
    with pytest.raises(ValueError, match="blocks must have tokens"):
        numerics.kv_store(normal(1, 1, 5), cache, *where)
    with pytest.raises(ValueError, match="blocks must have tokens"):
        numerics.paged_attention(normal(1, 1, 5), cache, cache, *where, scale=1.0)


def test_errors_name_the_argument() -> None:
    x, w, byte = normal(2, 8), normal(3, 8), np.zeros((3, 8), dtype=np.uint8)
    cases: list[tuple[str, Callable[[], object]]] = [
        (r"w must have extent 8 on axis 2, got 7", lambda: numerics.matmul_nt(x, w[:, :7])),
        (r"x must be float32, got format 'd'", lambda: numerics.matmul_nt(x.astype(np.float64), w)),  # type: ignore[arg-type]
        (r"w must be float32, bfloat16", lambda: numerics.matmul_nt(x, w.astype(np.int64))),
        (r"x must have contiguous rows", lambda: numerics.matmul_nt(normal(8, 2).T, w)),
        (r"weight must have extent 8", lambda: numerics.rms_norm(x, w[0, :5], 1e-6)),
        (r"down must have extent 3 on axis 1", lambda: numerics.mlp(x, w, w, w)),
        (r"scale must have extent 2 on axis 1, got 1", lambda: numerics.matmul_nt(x, wrong_scale())),
        (r"w must be uint8", lambda: numerics.matmul_nt(x, BlockScaled(w, w, 8, 8))),  # type: ignore[arg-type]
        (r"a block must have rows", lambda: numerics.matmul_nt(x, BlockScaled(byte, w, 0, 8))),
        (r"y must have at least 3 slots", lambda: numerics.combine(normal(2, 2, 8), normal(2, 3), x)),
        (r"topk_idx must have|impossible", lambda: numerics.route(x.copy(), **impossible_route())),
    ]
    for text, call in cases:
        with pytest.raises(ValueError, match=text):
            call()
    read_only = np.zeros((2, 3), dtype=np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="out must be a writable array"):
        numerics.matmul_nt(x, w, read_only)


def wrong_scale() -> BlockScaled:
    return BlockScaled(np.zeros((3, 8), dtype=np.uint8), np.ones((3, 1), dtype=np.float32), 1, 4)


def impossible_route() -> dict[str, Any]:
    return {
        "top_k": 5,
        "correction_bias": None,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }


def test_no_rows_give_no_rows() -> None:
    none = np.empty((0, 8), dtype=np.float32)
    assert numerics.matmul_nt(none, normal(3, 8)).shape == (0, 3)
    assert numerics.mlp(none, normal(3, 8), normal(3, 8), normal(8, 3)).shape == (0, 8)


def test_this_machine_passes_the_start_up_check(monkeypatch: pytest.MonkeyPatch) -> None:
    numerics.check_row_independence()

    def depends_on_neighbours(x: Array, w: Array) -> Array:
        return np.asarray(x @ w.T.astype(np.float32) + np.float32(len(x)))

    monkeypatch.setattr(numerics, "matmul_nt", depends_on_neighbours)
    with pytest.raises(RuntimeError, match="matmul_nt: the bits of a row depend on its neighbours"):
        numerics.check_row_independence()
