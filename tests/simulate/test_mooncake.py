"""The beginning of a real trace through the pure cores: prefix hits against an ideal cache."""

from __future__ import annotations

import pytest

from tests.simulate.mooncake import TRACE, Outcome, Simulation, World, ideal_hit_tokens, read_trace

NUM_REQUESTS = 400
needs_trace = pytest.mark.skipif(not TRACE.is_file(), reason="the Mooncake trace is not here")


def run(policy: str, world: World) -> Outcome:
    simulation = Simulation(policy, world)
    outcome = simulation.run(list(read_trace(TRACE, world, NUM_REQUESTS)))
    simulation.check_invariants()
    assert (outcome.num_requests, outcome.num_failed) == (NUM_REQUESTS, 0)
    return outcome


def test_the_ideal_cache_counts_whole_blocks_but_never_the_last_token() -> None:
    assert ideal_hit_tokens([(1, 2, 3, 4), (1, 2, 3, 4)], 2) == 2
    assert ideal_hit_tokens([(1, 2, 3, 4), (1, 2, 3, 4, 5), (9, 2, 3, 4, 5), (1, 2, 8)], 2) == 4 + 0 + 2


@needs_trace
def test_one_group_hits_what_an_ideal_cache_would() -> None:
    outcome = run("prefix", World(num_groups=1))
    assert outcome.ideal_hit_tokens > 0
    assert outcome.hit_tokens == pytest.approx(outcome.ideal_hit_tokens, rel=0.02)


@needs_trace
def test_prefixes_are_found_across_groups_where_turns_lose_them() -> None:
    by_prefix, in_turn = run("prefix", World()), run("round_robin", World())
    assert by_prefix.hit_tokens >= 0.95 * by_prefix.ideal_hit_tokens
    assert in_turn.hit_tokens < 0.8 * in_turn.ideal_hit_tokens
    assert max(by_prefix.requests_by_group) < NUM_REQUESTS / 2, "the load is spread all the same"


@needs_trace
def test_with_too_little_memory_hits_are_lost_and_nothing_else() -> None:
    outcome = run("prefix", World(num_groups=1, num_blocks=500))
    assert 0 < outcome.hit_tokens < 0.9 * outcome.ideal_hit_tokens


@needs_trace
def test_a_host_tier_makes_up_for_too_little_memory() -> None:
    outcome = run("prefix", World(num_groups=1, num_blocks=500, num_host_blocks=20_000))
    assert outcome.hit_tokens == pytest.approx(outcome.ideal_hit_tokens, rel=0.02)
