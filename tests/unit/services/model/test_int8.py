"""INT8 products: equal to the bit on every instruction set, and refusals."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.model import _int8, numerics
from services.model import numerics_reference as twin
from services.model.int8 import Int8Matrix, quantise_rows

Float = npt.NDArray[np.float32]
SHAPES = [(1, 1, 1), (1, 4, 64), (2, 7, 65), (3, 5, 16), (4, 12, 128), (6, 9, 257), (33, 21, 100)]
INSTRUCTION_SETS = ("generic", "avx2", "vnni")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _int8.instruction_set()
    try:
        _int8.select_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"{request.param} is not available on this machine")
    yield request.param
    _int8.select_instruction_set(before)


def matrix(rng: np.random.Generator, rows: int, columns: int) -> Int8Matrix:
    q = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    return Int8Matrix(q, rng.random(rows, dtype=np.float32))


@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_product_equals_its_twin_to_the_bit(
    instruction_set: str, rows: int, columns: int, depth: int
) -> None:
    rng = np.random.default_rng(rows)
    x, w = rng.standard_normal((rows, depth), dtype=np.float32), matrix(rng, columns, depth)
    x[0, 0] = 1e4  # an outlier, and below a row of zeros
    x[-1] *= rows == 1
    assert numerics.matmul_nt(x, w).tobytes() == twin.int8_matmul_nt(x, w.q, w.scale).tobytes()


def test_extreme_numbers_do_not_overflow(instruction_set: str) -> None:
    depth = 131_072
    x, q = np.full((2, depth), -3.0, np.float32), np.full((3, depth), 127, np.int8)
    q[1] = -127
    out = numerics.matmul_nt(x, Int8Matrix(q, np.ones(3, np.float32)))
    assert out.tobytes() == twin.int8_matmul_nt(x, q, np.ones(3, np.float32)).tobytes()
    assert out[0, 0] == -out[0, 1] == -np.float32(127 * 127 * depth) * np.float32(np.float32(3) / 127)


def test_mlp_quantises_twice(instruction_set: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 48), dtype=np.float32)
    gate, up, down = matrix(rng, 33, 48), matrix(rng, 33, 48), matrix(rng, 48, 33)
    inner = numerics.silu_mul(numerics.matmul_nt(x, gate), numerics.matmul_nt(x, up))
    wanted = numerics.matmul_nt(inner, down)
    assert numerics.mlp(x, gate, up, down).tobytes() == wanted.tobytes()
    alone = np.concatenate([numerics.mlp(x[i : i + 1], gate, up, down) for i in range(5)])
    assert alone.tobytes() == wanted.tobytes()


def test_views_of_rows_and_of_activations_are_taken_as_they_lie(instruction_set: str) -> None:
    rng = np.random.default_rng(2)
    wide, w = rng.standard_normal((4, 100), dtype=np.float32), matrix(rng, 10, 40)
    x, some = wide[::2, 30:70], w.rows(3, 8)
    out = np.zeros((2, 9), np.float32)
    numerics.matmul_nt(x, some, out[:, 2:7])
    assert out[:, 2:7].tobytes() == twin.int8_matmul_nt(x, some.q, some.scale).tobytes()
    assert not out[:, :2].any() and not out[:, 7:].any()


@given(st.lists(st.floats(width=32), min_size=1, max_size=70))
@settings(max_examples=200, deadline=None)
def test_rows_equal_their_twin(values: list[float]) -> None:
    x = np.array([values], np.float32)
    q, scale = quantise_rows(x)
    with np.errstate(invalid="ignore", over="ignore"):
        wanted, wanted_scale = twin.int8_rows(x)
    assert scale.tobytes() == wanted_scale.tobytes() or (np.isnan(scale) == np.isnan(wanted_scale)).all()
    assert (q == wanted).all()


def test_a_row_that_is_not_finite_gives_nan_and_spares_its_neighbours() -> None:
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((3, 20), dtype=np.float32), matrix(rng, 4, 20)
    good = numerics.matmul_nt(x, w)
    x[1, 5] = np.inf
    out = numerics.matmul_nt(x, w)
    assert np.isnan(out[1]).all()
    assert out[[0, 2]].tobytes() == good[[0, 2]].tobytes()


@pytest.mark.parametrize(
    ("q", "scale", "message"),
    [
        (np.zeros((4, 20), np.int16), np.zeros(4, np.float32), "w must be int8"),
        (np.zeros((4, 20), np.int8), np.zeros(3, np.float32), "scale must have extent 4 on axis 0, got 3"),
        (np.zeros((4, 21), np.int8), np.zeros(4, np.float32), "w must have extent 20 on axis 1, got 21"),
        (np.zeros((1, 131_073), np.int8), np.zeros(1, np.float32), "at most 131072 are supported"),
    ],
)
def test_wrong_arrays_are_refused(q: npt.NDArray[np.int8], scale: Float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numerics.matmul_nt(np.zeros((2, 20), np.float32), Int8Matrix(q, scale))
