"""What a request takes over from the prefix cache, and what it must not."""

from __future__ import annotations

from typing import Any

import pytest

from bus.control.messages import StepFailed
from services.scheduler.events import ExecutorLost
from tests.harness.scheduling import Driver, add, connected, create_request

PROMPT = tuple(range(10))  # blocks of 4 tokens: two full ones and two tokens


def caching(**changes: Any) -> Driver:
    return connected(enable_prefix_caching=True, **changes)


def serve(driver: Driver, request_id: str, prompt: tuple[int, ...], **fields: Any) -> tuple[int, int]:
    """Run a request alone to its end; return where its first chunk began and the cached tokens it reports."""
    first = len(driver.plans)
    driver.feed(add(create_request(request_id, prompt=prompt, **fields)))
    while driver.core.requests:
        driver.complete()
    return driver.plans[first].sequences[0].start, driver.generated(request_id)[0].num_cached_tokens


def test_a_prompt_seen_before_begins_behind_its_full_blocks() -> None:
    driver = caching()
    assert serve(driver, "a", PROMPT) == (0, 0)
    assert serve(driver, "b", PROMPT) == (8, 8)
    assert serve(driver, "c", (*range(7), 99, 8, 9)) == (4, 4)
    assert serve(driver, "d", (99, *PROMPT)) == (0, 0)
    snapshot = driver.core.snapshot()
    assert (snapshot["prefix_cache_queries"], snapshot["prefix_cache_hits"]) == (41, 12)
    assert snapshot["num_free_blocks"] == 16 and snapshot["num_cached_blocks"] > 0


def test_the_last_token_is_always_computed() -> None:
    driver = caching()
    serve(driver, "a", PROMPT[:8])
    assert serve(driver, "b", PROMPT[:8]) == (4, 4)


def test_a_conversations_next_turn_finds_the_answer_too() -> None:
    driver = caching()
    serve(driver, "a", PROMPT, max_tokens=4)  # the last token drawn is never computed: 13 of 14 are
    assert serve(driver, "b", (*PROMPT, 7, 7, 7, 7, 50, 51)) == (12, 12)


def test_off_means_off() -> None:
    driver = connected(enable_prefix_caching=False)
    serve(driver, "a", PROMPT)
    assert serve(driver, "b", PROMPT) == (0, 0)
    assert driver.core.snapshot()["prefix_cache_queries"] == driver.core.snapshot()["num_cached_blocks"] == 0


def test_whoever_wants_the_prompts_log_probabilities_computes_all_of_it() -> None:
    driver = caching()
    serve(driver, "a", PROMPT)
    assert serve(driver, "b", PROMPT, prompt_logprobs=0) == (0, 0)
    assert len(driver.generated("b")[0].prompt_logprobs) == 9
    assert serve(driver, "c", PROMPT) == (8, 8), "and what it computed is shared like any other"


def test_samples_of_one_prompt_share_its_blocks() -> None:
    driver = caching()
    driver.feed(*(add(create_request(name, prompt=PROMPT, seed=ord(name))) for name in "abc"))
    assert driver.scheduled() == {"a": 10}, "the others wait for what a is computing"
    driver.complete()
    assert driver.scheduled() == {"a": 1, "b": 1, "c": 1}, "of the last block, only the last token is theirs"
    tables = [sequence.block_table for sequence in driver.plans[-1].sequences]
    assert len({table[:2] for table in tables}) == 1 and len({table[2] for table in tables}) == 3
    assert driver.core.snapshot()["num_free_blocks"] == 16 - 5
    assert driver.plans[-1].copies == ((tables[0][2], tables[1][2]), (tables[0][2], tables[2][2]))


def test_nobody_waits_for_a_request_that_left() -> None:
    driver = caching()
    driver.feed(add(create_request("a", prompt=range(30))), add(create_request("b", prompt=range(30))))
    assert driver.scheduled() == {"a": 16}
    driver.complete()
    driver.feed(add(create_request("a", attempt=1, prompt=(1, 2, 3))))
    driver.complete()
    (sequence,) = [one for one in driver.plans[-1].sequences if one.request_id == "b"]
    assert sequence.start == 16, "what a completed counts; the step that it left does not"


def test_a_preempted_request_takes_its_own_blocks_back() -> None:
    driver = caching(num_blocks=4)
    requests = (create_request("a", prompt=range(7)), create_request("b", prompt=range(50, 57)))
    driver.feed(*(add(request) for request in requests))
    driver.complete(lambda sequence: 100 + ord(sequence.request_id))
    driver.complete()
    assert driver.core.snapshot()["num_preemptions"] == 1
    while "b" not in driver.scheduled():
        driver.complete()
    (sequence,) = [one for one in driver.plans[-1].sequences if one.request_id == "b"]
    assert sequence.start == 4
    assert driver.generated("b")[0].num_cached_tokens == 0, "usage tells of the first admission"


@pytest.mark.parametrize("dead", [True, False])
def test_an_executors_cache_is_lost_with_it(dead: bool) -> None:
    driver = caching()
    serve(driver, "a", PROMPT)
    driver.feed(ExecutorLost(1, "test", dead))
    assert driver.core.snapshot()["num_cached_blocks"] == 0
    driver.connect(2 if dead else 1)
    assert serve(driver, "b", PROMPT) == (0, 0)


def test_another_block_size_makes_other_hashes() -> None:
    driver = caching()
    driver.feed(add(create_request("a", prompt=PROMPT)))
    driver.feed(ExecutorLost(1, "test"))
    driver.connect(2, block_tokens=2)
    while driver.core.requests:
        driver.complete()
    assert serve(driver, "b", PROMPT) == (8, 8)


def test_what_a_failed_step_computed_is_not_kept() -> None:
    driver = caching()
    driver.feed(add(create_request("a", prompt=PROMPT)))
    step_id = driver.plans[-1].step_id
    driver.feed(StepFailed(step_id=step_id, incarnation=1, code="experts_away", message="expert-0"))
    assert serve(driver, "b", PROMPT) == (0, 0)
