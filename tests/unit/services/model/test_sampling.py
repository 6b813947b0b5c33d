"""Sampling: what a draw depends on, and the distribution that it follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from services.model.sampling import sample, token_logprob, uniform

ROW = np.array([1.0, 3.0, 2.0, 3.0, -1.0], dtype=np.float32)
DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 5, "position": 3}


def draws(count: int, row: np.ndarray[Any, Any] = ROW, **changes: Any) -> list[int]:
    return [sample(row, **(DEFAULTS | changes | {"position": i})) for i in range(count)]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert sample(ROW, **(DEFAULTS | {"temperature": 0.0})) == 1
    assert sample(ROW, **(DEFAULTS | {"top_k": 1})) == 1


def test_a_draw_depends_on_seed_and_position_only() -> None:
    first = draws(50)
    assert draws(50) == first
    assert draws(50, seed=6) != first
    assert len(set(first)) > 1


def test_frequencies_follow_the_softmax() -> None:
    counts = np.bincount(draws(4000, temperature=1.5), minlength=5) / 4000
    expected = np.exp(ROW / 1.5) / np.exp(ROW / 1.5).sum()
    np.testing.assert_allclose(counts, expected, atol=0.03)


def test_top_k_keeps_the_likeliest_lower_id_first_on_a_tie() -> None:
    assert set(draws(200, top_k=2)) == {1, 3}
    assert set(draws(200, top_k=3)) == {1, 2, 3}
    tied = np.zeros(6, dtype=np.float32)
    assert set(draws(200, tied, top_k=2)) == {0, 1}


def test_top_p_keeps_at_least_the_likeliest() -> None:
    assert set(draws(200, top_p=1e-9)) == {1}
    assert set(draws(200, top_p=0.6)) == {1, 3}


def test_banned_ids_are_never_drawn() -> None:
    assert set(draws(200, banned_ids=(1, 3, 99))) == {0, 2, 4}
    assert sample(ROW, **(DEFAULTS | {"temperature": 0.0, "banned_ids": (1,)})) == 3
    with pytest.raises(ValueError, match="no token is left"):
        sample(ROW, **DEFAULTS, banned_ids=range(5))


def test_the_row_is_left_as_it_is() -> None:
    row = ROW.copy()
    sample(row, **DEFAULTS, banned_ids=(1,))
    np.testing.assert_array_equal(row, ROW)


def test_uniform_numbers_are_fixed_by_seed_and_position() -> None:
    numbers = {uniform(seed, position) for seed in (0, 1, 2**63 - 1) for position in range(100)}
    assert len(numbers) == 300
    assert all(0.0 <= number < 1.0 for number in numbers)


def test_logprobs_and_ranks() -> None:
    expected = ROW.astype(np.float64) - np.log(np.exp(ROW.astype(np.float64)).sum())
    result = token_logprob(ROW, 3, 3)
    assert (result.token_id, result.rank, result.top_token_ids) == (3, 2, (1, 3, 2))
    np.testing.assert_allclose(result.logprob, expected[3])
    np.testing.assert_allclose(result.top_logprobs, expected[[1, 3, 2]])
    alone = token_logprob(ROW, 4, 0)
    assert (alone.rank, alone.top_token_ids, alone.top_logprobs) == (5, (), ())
    assert len(token_logprob(ROW, 0, 20).top_token_ids) == 5


def by_sorting(row: np.ndarray[Any, Any], *, temperature: float, top_p: float, min_p: float, u: float) -> int:
    """The whole vocabulary sorted: what the short ways must not differ from."""
    order = np.argsort(-row, kind="stable")
    weights = np.exp((row[order].astype(np.float64) - float(row.max())) / temperature)
    weights[weights < min_p] = 0
    mass = np.cumsum(weights) / weights.sum()
    kept = mass[: int(np.searchsorted(mass, top_p)) + 1] if top_p < 1 else mass
    return int(order[int(np.searchsorted(kept, u * kept[-1], side="right"))])


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("min_p", [0.0, 0.01])
def test_short_ways_through_a_large_vocabulary_draw_the_same(
    temperature: float, top_p: float, min_p: float
) -> None:
    rng = np.random.default_rng(5)
    flat = (rng.standard_normal(12_000) * 0.5).astype(np.float32)  # needs every candidate
    steep = flat * 10
    masked = steep.copy()
    masked[rng.random(12_000) < 0.999] = -np.inf
    for row in (flat, steep, masked):
        for position in range(4):
            fields: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
            drawn = sample(row, **fields, top_k=0, seed=9, position=position)
            assert drawn == by_sorting(row, **fields, u=uniform(9, position))


def test_the_last_candidate_with_weight_stands_in_for_rounding() -> None:
    row = np.array([0.0, 0.0, -np.inf, -np.inf], dtype=np.float32)
    assert set(draws(300, row)) == {0, 1}
    assert set(draws(300, row, top_k=3)) == {0, 1}
