"""The expert map: everyone derives the same one; each expert lives once; the shared expert takes turns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.balance.placement import ExpertMap, owned_experts


@given(st.integers(1, 300), st.integers(1, 64))
def test_every_expert_has_one_owner_and_shares_differ_by_at_most_one(
    num_experts: int, num_ranks: int
) -> None:
    owned = [owned_experts(num_experts, num_ranks, rank) for rank in range(num_ranks)]
    assert [e for part in owned for e in part] == list(range(num_experts))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_map_and_ownership_agree() -> None:
    expert_map = ExpertMap.contiguous(10, 4, has_shared_expert=False)
    for rank in range(4):
        assert np.flatnonzero(expert_map.owner == rank).tolist() == list(owned_experts(10, 4, rank))


def test_more_workers_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="expert_workers=5 must be at most num_experts=4"):
        ExpertMap.contiguous(4, 5, has_shared_expert=False)


def test_the_shared_expert_is_the_last_slot_and_rotates_over_the_ranks() -> None:
    expert_map = ExpertMap.contiguous(8, 4, has_shared_expert=True)
    topk = np.asarray([[0, 7], [3, 4], [1, 2]], np.int32)
    slot_expert, slot_rank = expert_map.slots(topk, first_rank=3)
    assert slot_expert.tolist() == [[0, 7, 8], [3, 4, 8], [1, 2, 8]]
    assert slot_rank.tolist() == [[0, 3, 3], [1, 2, 0], [0, 1, 1]]
    assert slot_rank.dtype == np.int32


def test_without_a_shared_expert_slots_are_the_routers() -> None:
    topk = np.asarray([[5, 0]], np.int32)
    slot_expert, slot_rank = ExpertMap.contiguous(8, 4, has_shared_expert=False).slots(topk, first_rank=0)
    assert slot_expert is topk
    assert slot_rank.tolist() == [[2, 0]]
