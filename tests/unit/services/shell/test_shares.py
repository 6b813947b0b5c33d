"""How a step's budget is shared: short prompts first, the oldest never without."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.shell.shares import OLDEST_SHARE, chunked_shares, whole_shares

MISSING = st.lists(st.integers(1, 2000), max_size=12)
BUDGET = st.integers(1, 600)


@pytest.mark.parametrize(
    ("num_missing", "budget", "shares"),
    [
        ([], 16, []),
        ([5], 16, [5]),
        ([100], 16, [16]),
        ([100, 3, 5], 16, [8, 3, 5]),  # the short ones whole, the long one the rest
        ([100, 20, 30], 16, [4, 12, 0]),  # the oldest its quarter, then the shortest
        ([20, 100], 16, [16, 0]),
        ([100, 100], 1, [1, 0]),
    ],
)
def test_chunked(num_missing: list[int], budget: int, shares: list[int]) -> None:
    assert chunked_shares(num_missing, budget) == shares


@pytest.mark.parametrize(
    ("num_missing", "shares"),
    [([], []), ([100], [100]), ([5, 9, 4], [5, 0, 4]), ([5, 4, 7], [5, 4, 7]), ([20, 1], [20, 0])],
)
def test_whole(num_missing: list[int], shares: list[int]) -> None:
    assert whole_shares(num_missing, 16) == shares


@given(num_missing=MISSING, budget=BUDGET)
def test_chunks_use_up_the_budget_and_nobody_gets_more_than_it_lacks(
    num_missing: list[int], budget: int
) -> None:
    shares = chunked_shares(num_missing, budget)
    assert sum(shares) == min(sum(num_missing), budget)
    assert all(0 <= share <= lacks for share, lacks in zip(shares, num_missing, strict=True))
    if shares:
        assert shares[0] >= min(num_missing[0], max(1, budget // OLDEST_SHARE))


@given(num_missing=MISSING, budget=BUDGET)
def test_a_long_prompt_takes_no_more_than_its_share_from_shorter_ones(
    num_missing: list[int], budget: int
) -> None:
    shares = chunked_shares(num_missing, budget)
    hungry = [index for index, share in enumerate(shares) if index and share < num_missing[index]]
    if hungry:
        shortest = min(num_missing[index] for index in hungry)
        taken = sum(
            share for lacks, share in zip(num_missing[1:], shares[1:], strict=True) if lacks > shortest
        )
        assert taken == 0
        if num_missing[0] > shortest:
            assert shares[0] == min(num_missing[0], max(1, budget // OLDEST_SHARE))


@given(num_missing=MISSING, budget=BUDGET)
def test_whole_prompts_keep_the_budget_but_for_the_oldest(num_missing: list[int], budget: int) -> None:
    shares = whole_shares(num_missing, budget)
    assert all(share in (0, lacks) for share, lacks in zip(shares, num_missing, strict=True))
    assert not shares or (shares[0] == num_missing[0] and sum(shares) <= max(budget, shares[0]))
