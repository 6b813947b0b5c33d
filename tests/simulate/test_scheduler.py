"""The scheduler's core under seeded chaos: every request that nobody gave up gets the oracle's tokens, once,
in order.

The seed is in the test's name: `pytest tests/simulate -k seed42` replays it.
"""

from __future__ import annotations

from collections import Counter

import pytest

from services.scheduler.core import SchedulerCore
from tests.harness.scheduler_world import World
from tests.harness.toy_executor import ToyExecutor

SEEDS = range(200)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed}")
def test_every_request_gets_the_oracles_tokens(seed: int) -> None:
    World(seed).run()


def test_the_faults_really_happen() -> None:
    seen: Counter[str] = Counter()
    for seed in range(20):
        world = World(seed)
        world.run()
        seen.update(world.core.snapshot())
        seen["executors"] += world.executor_incarnation
        seen["schedulers"] += world.scheduler_incarnation
        seen["over"] += sum(client.is_over for client in world.clients.values())
        seen["attempts"] += sum(client.attempt for client in world.clients.values())
    assert seen["over"] > 100 and seen["executors"] > 40 and seen["schedulers"] > 30 and seen["attempts"] > 50
    for name in (
        "prefix_cache_hits",
        "num_preemptions",
        "num_executors_lost",
        "num_ignored_results",
        "num_aborted_requests",
        "num_prefills_handed_over",
        "num_prefills_failed",
        "num_steps_ahead",
        "num_kv_fetches",
        "num_kv_fetches_failed",
    ):
        assert seen[name] > 0, name


def test_a_scheduler_that_shares_blocks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation itself is tested: a pool that hands out a block twice must not pass."""
    monkeypatch.setattr("services.cache.blocks.BlockPool.allocate", lambda self, n, stores=False: [0] * n)
    monkeypatch.setattr("services.cache.blocks.BlockPool.free", lambda self, ids: None)
    monkeypatch.setattr("services.scheduler.core.SchedulerCore.check_invariants", lambda self: None)
    with pytest.raises(AssertionError, match=r"not the (oracle's )?tokens"):
        for seed in range(20):
            World(seed, enable_prefix_caching=False).run()


@pytest.mark.parametrize("seed", SEEDS[:60], ids=lambda seed: f"seed{seed}")
def test_evicted_blocks_come_back_and_open_ones_are_copied(seed: int) -> None:
    World(seed, pressed=True, enable_prefix_caching=True).run()


def test_under_pressure_every_tier_is_used() -> None:
    seen: Counter[str] = Counter()
    for seed in range(20):
        world = World(seed, pressed=True, enable_prefix_caching=True)
        world.run()
        seen.update(world.core.snapshot())
    for name in ("prefix_cache_hits", "external_prefix_cache_hits", "num_copied_tokens", "num_preemptions"):
        assert seen[name] > 20, name


def test_a_slot_that_is_given_away_before_it_is_read_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cache.host_tier.HostTier.pin", lambda self, hashes: None)
    with pytest.raises(AssertionError):
        for seed in range(100):
            World(seed, pressed=True, enable_prefix_caching=True).run()


def test_an_open_block_copied_to_the_wrong_length_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "services.batching.batch._num_equal", lambda some, others: min(len(some), len(others))
    )
    with pytest.raises(AssertionError, match="not the oracle's tokens"):
        for seed in range(40):
            World(seed, pressed=True, enable_prefix_caching=True).run()


def test_a_prefix_cache_that_forgets_what_came_before_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens after others have other KV: a hash of a block's own tokens must not pass."""
    monkeypatch.setattr("bus.block_hash.chained_hash", lambda parent, token_ids: bytes(map(abs, token_ids)))
    with pytest.raises(AssertionError):
        for seed in range(40):
            World(seed, enable_prefix_caching=True).run()


def test_a_transfer_that_is_not_cancelled_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a request that ends in mid-transfer are handed out again: nobody may write them any more."""
    monkeypatch.setattr(SchedulerCore, "_cancel_fetch", lambda self, fetch_id: None)
    with pytest.raises(AssertionError):
        for seed in range(400):
            World(seed, prefill_tokens_min=1, max_num_seqs=6).run()


def test_a_token_computed_before_its_kv_has_arrived_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyExecutor, "receive", lambda self, block_id, entries: None)
    with pytest.raises(AssertionError):  # not the oracle's tokens, or another history than the scheduler's
        for seed in range(20):
            World(seed, prefill_tokens_min=1).run()
