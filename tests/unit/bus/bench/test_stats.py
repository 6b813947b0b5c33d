from __future__ import annotations

import pytest

from bus.bench.stats import figures, mean_ratio, median_ratio, repetitions


def test_one_disturbed_round_does_not_decide() -> None:
    found = figures([[1_000, 2_000, 3_000], [90_000, 90_000, 90_000], [3_000, 3_000, 3_000]])
    assert (found.p50_us, found.low_us, found.high_us, found.samples) == (3.0, 2.0, 90.0, 9)
    assert found.p99_us == pytest.approx(90.0)
    assert found.mean_us == 3.0


def test_the_mean_shows_what_a_median_of_pairs_hides() -> None:
    found = figures([[1_000, 9_000, 1_000, 9_000, 9_000]])
    assert (found.p50_us, found.mean_us) == (9.0, 5.8)


def test_a_round_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="each round needs at least one"):
        figures([[1.0], []])
    with pytest.raises(ValueError, match="each round needs at least one"):
        figures([])


def test_a_ratio_compares_within_rounds() -> None:
    # The machine was ten times slower in the second round; the ratio does not see it.
    assert median_ratio([[2, 2], [20, 20], [2, 2]], [[1, 1], [10, 10], [1, 1]]) == 2.0
    assert mean_ratio([[2, 4], [20, 40]], [[1, 2], [10, 20]]) == 2.0
    with pytest.raises(ValueError):
        median_ratio([[1]], [[1], [1]])


@pytest.mark.parametrize(("once_ns", "wanted"), [(1e6, 100), (1e9, 4), (1, 400), (0, 400)])
def test_repetitions_fill_the_budget_within_bounds(once_ns: float, wanted: int) -> None:
    assert repetitions(once_ns, 0.1, low=4, high=400) == wanted
