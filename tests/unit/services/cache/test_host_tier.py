"""Slots of the host tier, and when reading pays."""

from __future__ import annotations

import pytest

from services.cache.blocks import BlockPool
from services.cache.host_tier import HostTier
from services.cache.tier_cost import TierCost


def name(number: int) -> bytes:
    return bytes([number]) * 32


def test_slots_are_given_in_turn_and_the_least_recent_is_forgotten() -> None:
    tier = HostTier(2)
    assert [tier.store(name(1)), tier.store(name(2)), tier.store(name(1))] == [0, 1, None]
    assert tier.store(name(3)) == 1, "block 1 was seen again"
    assert (tier.match([name(1), name(3), name(2)]), tier.num_used) == ([0, 1], 2)
    tier.check_invariants()


def test_a_pinned_slot_is_kept_until_the_plan_is_made() -> None:
    tier = HostTier(2)
    tier.store(name(1))
    tier.store(name(2))
    tier.pin([name(1)])
    assert [tier.store(name(3)), tier.store(name(4))] == [1, 1], "only the other may be overwritten"
    tier.pin([name(4)])
    assert tier.store(name(5)) is None
    tier.check_invariants()
    tier.unpin()
    assert tier.store(name(5)) is not None


def test_a_pool_stores_what_it_evicts_only_when_told_to() -> None:
    pool = BlockPool(num_blocks=2, block_tokens=1, host=HostTier(4))
    first, second = pool.allocate(2)
    pool.publish(first, name(1), None)
    pool.publish(second, name(2), name(1))
    pool.free([first, second])
    assert pool.allocate(1) == [second] and pool.stores == []
    assert pool.allocate(1, stores=True) == [first] and pool.stores == [(first, 0)]
    pool.check_invariants()


def cost(bytes_per_s: int) -> TierCost:
    return TierCost(block_tokens=4, block_bytes=1000, bytes_per_s=bytes_per_s, step_tokens=100)


def test_reading_pays_until_computing_is_known_to_be_faster() -> None:
    slow_file = cost(bytes_per_s=1_000_000)  # a block takes 1000 us
    assert slow_file.reading_pays
    slow_file.observe(49, 1)
    assert slow_file.reading_pays, "a step that is not half full says nothing"
    slow_file.observe(100, 100 * 249)
    assert not slow_file.reading_pays
    for _ in range(20):
        slow_file.observe(100, 100 * 260)
    assert slow_file.reading_pays
    assert slow_file.token_us == pytest.approx(260, rel=0.01)


def test_a_file_that_was_not_measured_counts_as_free() -> None:
    free = cost(bytes_per_s=0)
    free.observe(100, 1)
    assert free.reading_pays
