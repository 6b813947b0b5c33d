"""Rounding with error compensation: laws, and a gain over rounding each entry by itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from services.quantize.gptq import gptq, output_error, round_to_nearest

Float = npt.NDArray[np.float32]


def correlated(rng: np.random.Generator, rows: int, columns: int) -> Float:
    mixing = rng.standard_normal((columns, columns)) * 0.3 + np.eye(columns)
    return (rng.standard_normal((rows, columns)) @ mixing).astype(np.float32)


def hessian_of(x: Float) -> npt.NDArray[np.float64]:
    wide = x.astype(np.float64)
    return wide.T @ wide


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 150])
def test_compensated_rounding_is_closer_in_output(columns: int) -> None:
    rng = np.random.default_rng(columns)
    x, w = correlated(rng, 600, columns), rng.standard_normal((20, columns), dtype=np.float32)
    hessian = hessian_of(x)
    plain, better = round_to_nearest(w), gptq(w, hessian)
    assert (plain.scale == better.scale).all()
    assert output_error(w, better, hessian) <= output_error(w, plain, hessian) * (
        1.0 if columns == 1 else 0.9
    )


def test_the_reported_error_is_that_of_the_outputs() -> None:
    rng = np.random.default_rng(5)
    x, w = correlated(rng, 100, 30), rng.standard_normal((8, 30), dtype=np.float32)
    rounded = round_to_nearest(w)
    lost, whole = x @ (w - rounded.widen()).T, x @ w.T
    expected = float((lost.astype(np.float64) ** 2).sum() / (whole.astype(np.float64) ** 2).sum())
    assert output_error(w, rounded, hessian_of(x)) == pytest.approx(expected, rel=1e-4)


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    x, w = correlated(rng, 300, 40), rng.standard_normal((5, 40), dtype=np.float32)
    blocked = gptq(w, hessian_of(x))
    monkeypatch.setattr("services.quantize.gptq.BLOCK_COLUMNS", 1)
    assert (gptq(w, hessian_of(x)).q == blocked.q).all()


def test_numbers_on_the_grid_stay_as_they_are() -> None:
    rng = np.random.default_rng(7)
    q = rng.integers(-127, 128, (6, 20))
    q[:, 3] = 127
    w = (q * np.float32(0.25)).astype(np.float32)
    x = correlated(rng, 50, 20)
    for rounded in (round_to_nearest(w), gptq(w, hessian_of(x))):
        assert (rounded.q == q).all()
        assert (rounded.scale == np.float32(0.25)).all()


def test_no_calibration_row_and_rows_of_zeros() -> None:
    w = np.zeros((2, 5), np.float32)
    w[1] = [1, -2, 3, 0, 0.1]
    rounded = gptq(w, np.zeros((5, 5)))
    assert (rounded.q == round_to_nearest(w).q).all()
    assert rounded.scale[0] == 0 and not rounded.q[0].any()


@pytest.mark.parametrize(
    ("w", "hessian", "damping", "message"),
    [
        (np.full((2, 3), np.nan, np.float32), np.eye(3), 0.01, "finite"),
        (np.ones((2, 3), np.float32), np.eye(4), 0.01, r"hessian \[4, 4\]"),
        (np.ones((2, 3), np.float32), np.full((3, 3), np.inf), 0.01, "finite"),
        (np.ones((2, 3), np.float32), np.eye(3), 0.0, "damping 0.0 must be positive"),
    ],
)
def test_refusals(w: Float, hessian: npt.NDArray[np.float64], damping: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gptq(w, hessian, damping=damping)
