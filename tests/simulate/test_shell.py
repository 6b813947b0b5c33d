"""The TE-shell's core under seeded chaos: every task that nobody gave up gets the oracle's token and its KV offered.

The seed is in the test's name: `pytest tests/simulate -k seed42` replays it.
"""

from __future__ import annotations

from collections import Counter

import pytest

from services.shell.batch import PrefillBatcher
from tests.harness.shell_world import ShellWorld

SEEDS = range(200)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed}")
def test_every_prompt_is_computed_and_offered(seed: int) -> None:
    ShellWorld(seed).run()


def test_the_faults_really_happen() -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        world = ShellWorld(seed)
        world.run()
        seen.update(world.core.snapshot())
        seen["shells"] += world.shell_incarnation
        seen["workers"] += sum(world.incarnations)
        seen["fetched"] += world.num_fetched
    assert seen["fetched"] > 200 and seen["shells"] > 60 and seen["workers"] > 100
    for name in (
        "prefix_cache_hits",
        "num_workers_lost",
        "num_withdrawn_offers",
        "num_ended_offers",
        "num_aborted_tasks",
        "num_failed_tasks",
        "num_ignored_results",
    ):
        assert seen[name] > 10, f"{name}: {seen[name]}"


def test_the_simulation_sees_blocks_that_are_freed_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    offer = PrefillBatcher.offer

    def offer_and_free(self: PrefillBatcher, request: object) -> None:
        offer(self, request)  # type: ignore[arg-type]  # as it is called
        self.offered[-1].block_ids, block_ids = list(self.offered[-1].block_ids), self.offered[-1].block_ids
        self.free(block_ids)
        self.offered[-1].block_ids = []

    monkeypatch.setattr(PrefillBatcher, "offer", offer_and_free)
    with pytest.raises(AssertionError):
        for seed in range(20):
            ShellWorld(seed).run()
