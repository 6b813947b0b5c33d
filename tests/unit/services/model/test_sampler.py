"""Parameters that change a row before it is drawn from, alone and together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bus.control.messages import SamplingParams
from services.model.sampler import Sampler
from services.model.sampling import adjust, sample
from tests.conftest import GOLDENS

ROW = np.array([1.0, 3.0, 2.0, 3.0, -1.0], dtype=np.float32)


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 10, "temperature": 0.0} | fields))


def draw(row: np.ndarray[Any, Any], given: SamplingParams, **fields: Any) -> int:
    sampler = Sampler(GOLDENS / "qwen3_moe", len(row))
    return sampler.draw(row, given, **({"position": 3, "allow_stop": True} | fields))


def test_bias_is_added_and_unknown_ids_are_ignored() -> None:
    row = adjust(ROW, params(logit_bias=((0, 5.0), (4, -2.5), (99, 1.0))))
    np.testing.assert_array_equal(row, [6.0, 3.0, 2.0, 3.0, -3.5])
    assert draw(ROW, params(logit_bias=((4, 100.0),))) == 4


def test_repetition_penalty_is_for_prompt_and_output_each_once() -> None:
    row = adjust(ROW, params(repetition_penalty=2.0), prompt_token_ids=[1, 1, 4, 77], output_token_ids=[2, 2])
    np.testing.assert_array_equal(row, [1.0, 1.5, 1.0, 3.0, -2.0])


def test_frequency_counts_and_presence_does_not() -> None:
    outputs = [1, 1, 1, 3]
    frequency = adjust(ROW, params(frequency_penalty=0.5), output_token_ids=outputs)
    np.testing.assert_array_equal(frequency, [1.0, 1.5, 2.0, 2.5, -1.0])
    presence = adjust(ROW, params(presence_penalty=0.5), output_token_ids=outputs)
    np.testing.assert_array_equal(presence, [1.0, 2.5, 2.0, 2.5, -1.0])


def test_bias_comes_before_penalties() -> None:
    row = adjust(ROW, params(logit_bias=((0, 3.0),), repetition_penalty=2.0), output_token_ids=[0])
    assert row[0] == 2.0  # (1 + 3) / 2


def test_min_p_keeps_what_is_likely_enough() -> None:
    common: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 5}
    drawn = {sample(ROW, **common, position=i, min_p=0.5) for i in range(200)}
    assert drawn == {1, 3}
    drawn = {sample(ROW, **common, position=i, min_p=0.3) for i in range(200)}
    assert drawn == {1, 2, 3}  # exp(-1) = 0.37
    assert {sample(ROW, **common, position=i, min_p=1.0) for i in range(200)} == {1, 3}


def test_min_p_is_measured_after_the_temperature() -> None:
    common: dict[str, Any] = {"temperature": 10.0, "top_p": 1.0, "top_k": 0, "seed": 5, "min_p": 0.5}
    assert {sample(ROW, **common, position=i) for i in range(300)} == {0, 1, 2, 3, 4}


def test_a_plain_request_is_drawn_as_before() -> None:
    """Neutral values change no draw, so a request draws the same tokens whether it spells them out or not."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((50, 300)).astype(np.float32) * 4
    for position, row in enumerate(rows):
        plain = params(temperature=0.9, top_p=0.9, top_k=40, seed=11)
        neutral = params(temperature=0.9, top_p=0.9, top_k=40, seed=11, logit_bias=((2, 0.0),))
        assert draw(row, plain, position=position) == draw(row, neutral, position=position)


def test_banned_tokens_stay_banned_whatever_their_bias() -> None:
    given = params(eos_token_ids=(4,), logit_bias=((4, 100.0),))
    assert draw(ROW, given) == 4
    assert draw(ROW, given, allow_stop=False) == 1


def test_no_token_left_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token is left"):
        draw(ROW, params(stop_token_ids=(0, 1, 2, 3, 4)), allow_stop=False)


def test_the_row_is_left_as_it_is() -> None:
    row = ROW.copy()
    draw(row, params(logit_bias=((0, 5.0),), stop_token_ids=(1,)), allow_stop=False)
    draw(row, params(stop_token_ids=(1,)), allow_stop=False)
    np.testing.assert_array_equal(row, ROW)


def test_numbers_agree_with_transformers_order_of_warpers() -> None:
    """Temperature, then min-p, then top-k, then top-p: an independent form, by masking probabilities."""
    rng = np.random.default_rng(8)
    row = rng.standard_normal(60).astype(np.float32) * 3
    kept = _kept(row.astype(np.float64), temperature=0.7, min_p=0.05, top_k=12, top_p=0.8)
    common: dict[str, Any] = {"temperature": 0.7, "top_p": 0.8, "top_k": 12, "min_p": 0.05}
    drawn = {sample(row, **common, seed=seed, position=1) for seed in range(2000)}
    assert drawn == kept


def _kept(
    row: np.ndarray[Any, Any], *, temperature: float, min_p: float, top_k: int, top_p: float
) -> set[int]:
    probs = np.exp(row / temperature)
    probs /= probs.sum()
    probs[probs < min_p * probs.max()] = 0
    probs[np.argsort(-probs)[top_k:]] = 0
    order = np.argsort(-probs, kind="stable")
    mass = np.cumsum(probs[order] / probs.sum())
    cut = int(np.searchsorted(mass, top_p)) + 1
    return {int(i) for i in order[:cut] if probs[i] > 0}
