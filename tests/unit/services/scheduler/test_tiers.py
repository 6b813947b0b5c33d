"""Blocks that come back from the host tier, and open blocks that are copied."""

from __future__ import annotations

from typing import Any

from bus.control.messages import DRAWN_BEFORE, StepFailed
from tests.harness.scheduling import Driver, add, create_core, create_request

PROMPT = tuple(range(10))  # blocks of 4 tokens: two full ones and two tokens


def with_host(num_blocks: int = 4, num_host_blocks: int = 8, **changes: Any) -> Driver:
    driver = Driver(create_core(enable_prefix_caching=True, **changes), num_blocks=num_blocks)
    driver.connect(num_host_blocks=num_host_blocks)
    return driver


def serve(driver: Driver, request_id: str, prompt: tuple[int, ...], **fields: Any) -> None:
    driver.feed(add(create_request(request_id, prompt=prompt, max_tokens=1, **fields)))
    while driver.core.requests:
        driver.complete()


def test_an_evicted_prefix_is_stored_and_read_back() -> None:
    driver = with_host()
    serve(driver, "a", PROMPT)
    serve(driver, "b", tuple(range(50, 64)))
    stored = driver.plans[-1].stores
    assert len(stored) == 2, "both full blocks of a, before b computes in them"
    serve(driver, "a2", PROMPT)
    plan = driver.plans[-1]
    assert [slot for slot, _ in plan.loads] == [slot for _, slot in reversed(stored)]
    assert [block_id for _, block_id in plan.loads] == list(plan.sequences[0].block_table[:2])
    assert (plan.sequences[0].start, driver.generated("a2")[0].num_cached_tokens) == (8, 8)
    snapshot = driver.core.snapshot()
    assert (snapshot["prefix_cache_hits"], snapshot["external_prefix_cache_hits"]) == (0, 8)
    assert snapshot["external_prefix_cache_queries"] == 10 + 14 + 10


def test_a_block_that_is_there_already_is_not_stored_again() -> None:
    driver = with_host()
    for _ in range(3):
        serve(driver, "a", tuple(range(14)))
        serve(driver, "b", tuple(range(50, 64)))
    assert [len(plan.stores) for plan in driver.plans] == [0, 3, 3, 0, 0, 0]
    assert [len(plan.loads) for plan in driver.plans] == [0, 0, 3, 3, 3, 3]


def test_without_a_tier_nothing_is_stored() -> None:
    driver = with_host(num_host_blocks=0)
    serve(driver, "a", PROMPT)
    serve(driver, "b", tuple(range(50, 64)))
    serve(driver, "a2", PROMPT)
    assert not any(plan.stores or plan.loads for plan in driver.plans)
    assert driver.core.snapshot()["external_prefix_cache_queries"] == 0


def test_reading_stops_when_computing_is_faster() -> None:
    driver = with_host()
    cost = driver.core.batch.cost
    assert cost is not None
    cost.read_us = 1000.0
    cost.observe(16, 16)
    serve(driver, "a", PROMPT)
    serve(driver, "b", tuple(range(50, 64)))
    serve(driver, "a2", PROMPT)
    assert not any(plan.stores or plan.loads for plan in driver.plans)


def test_a_failed_step_that_moved_blocks_empties_the_cache() -> None:
    driver = with_host()
    serve(driver, "a", PROMPT)
    driver.feed(add(create_request("b", prompt=range(50, 64), max_tokens=1)))
    plan = driver.plans[-1]
    assert plan.stores
    driver.feed(StepFailed(step_id=plan.step_id, incarnation=1, code="experts_away", message="x"))
    snapshot = driver.core.snapshot()
    assert (snapshot["num_cached_blocks"], snapshot["num_host_blocks"], snapshot["num_free_blocks"]) == (
        0,
        0,
        4,
    )
    serve(driver, "a2", PROMPT)
    assert driver.plans[-1].sequences[0].start == 0


def test_no_step_is_sent_ahead_that_would_have_to_store() -> None:
    """A step ahead may prove needless, and is then not executed: what counts as stored would not be."""
    driver = with_host(num_blocks=4, async_scheduling=True)
    serve(driver, "a", PROMPT[:8])
    num_answered = len(driver.plans)
    driver.feed(add(create_request("b", prompt=range(50, 57), max_tokens=8)))
    while driver.core.requests:
        driver.feed(driver.answer(driver.plans[num_answered]))
        num_answered += 1
    assert any(plan.stores for plan in driver.plans)
    ahead = [plan for plan in driver.plans if any(DRAWN_BEFORE in one.token_ids for one in plan.sequences)]
    assert ahead and not any(plan.stores for plan in ahead)


def test_a_failed_step_that_moved_nothing_keeps_it() -> None:
    driver = with_host()
    serve(driver, "a", PROMPT[:8])
    driver.feed(add(create_request("b", prompt=(50,))))
    step_id = driver.plans[-1].step_id
    driver.feed(StepFailed(step_id=step_id, incarnation=1, code="experts_away", message="x"))
    assert driver.core.snapshot()["num_cached_blocks"] == 2


# --------------------------------------------------------------------------- open blocks


def two(first: tuple[int, ...], second: tuple[int, ...], **fields: Any) -> Driver:
    """The first has computed its prompt when the second comes."""
    driver = with_host(num_blocks=16)
    driver.feed(add(create_request("a", prompt=first, max_tokens=8)))
    driver.complete()
    driver.feed(add(create_request("b", prompt=second, max_tokens=8, **fields)))
    driver.complete()
    return driver


def test_a_partial_block_is_copied_as_far_as_tokens_agree() -> None:
    driver = two(PROMPT, (*PROMPT[:9], 99, 98))
    a, b = driver.plans[-1].sequences
    assert (b.start, b.token_ids, driver.plans[-1].copies) == (
        9,
        (99, 98),
        ((a.block_table[2], b.block_table[2]),),
    )
    assert driver.core.snapshot()["num_copied_tokens"] == 1


def test_output_of_a_running_request_is_taken_over_too() -> None:
    driver = two(PROMPT, (*PROMPT, 7, 7, 7))  # a has drawn 7 twice when b is admitted, and computed the first
    assert driver.plans[-1].sequences[1].start == 11


def test_a_prompt_shorter_than_a_block_is_copied() -> None:
    driver = two((1, 2, 3), (1, 2, 3))
    assert driver.plans[-1].sequences[1].start == 2 and len(driver.plans[-1].copies) == 1


def test_the_same_tokens_behind_other_blocks_are_not() -> None:
    driver = two(PROMPT, (99, *PROMPT[1:]))
    assert driver.plans[-1].sequences[1].start == 0 and not driver.plans[-1].copies


def test_a_full_block_that_differs_at_its_end_is_copied_up_to_there() -> None:
    driver = two(PROMPT, (0, 1, 2, 99, 98))
    assert driver.plans[-1].sequences[1].start == 3 and len(driver.plans[-1].copies) == 1


def test_whoever_wants_prompt_log_probabilities_copies_nothing() -> None:
    driver = two(PROMPT, PROMPT, prompt_logprobs=0)
    assert driver.plans[-1].sequences[1].start == 0 and not driver.plans[-1].copies


def test_without_prefix_caching_nothing_is_copied() -> None:
    driver = Driver(create_core(enable_prefix_caching=False))
    driver.connect()
    driver.feed(add(create_request("a", prompt=PROMPT)))
    driver.complete()
    driver.feed(add(create_request("b", prompt=PROMPT)))
    driver.complete()
    assert not any(plan.copies for plan in driver.plans)
