"""Which tokens of which requests go into a step."""

from __future__ import annotations

from bus.control.messages import TokensGenerated
from tests.harness.scheduling import add, connected, create_request


def test_a_request_is_prefilled_then_decoded_token_by_token() -> None:
    driver = connected()
    driver.feed(add(create_request(prompt=[1, 2, 3])))
    (sequence,) = driver.plans[-1].sequences
    assert (sequence.token_ids, sequence.start, sequence.sample) == ((1, 2, 3), 0, True)
    driver.complete(lambda _: 50)
    (sequence,) = driver.plans[-1].sequences
    assert (sequence.token_ids, sequence.start, sequence.sample) == ((50,), 3, True)
    assert sequence.num_prompt_tokens == 3


def test_a_long_prompt_is_chunked_and_only_its_last_chunk_samples() -> None:
    driver = connected()
    driver.feed(add(create_request(prompt=range(40))))
    seen = []
    for _ in range(3):
        (sequence,) = driver.plans[-1].sequences
        seen.append((sequence.start, len(sequence.token_ids), sequence.sample, sequence.sampling is None))
        driver.complete()
    assert seen == [(0, 16, False, True), (16, 16, False, True), (32, 8, True, False)]
    assert [m.token_ids for m in driver.generated()] == [(7,)]


def test_running_requests_come_before_a_newcomers_prompt() -> None:
    driver = connected()
    driver.feed(add(create_request("a")), add(create_request("b")))
    driver.feed(add(create_request("long", prompt=range(30))))
    driver.complete()
    assert driver.scheduled() == {"a": 1, "b": 1, "long": 14}
    driver.complete()
    assert driver.scheduled() == {"a": 1, "b": 1, "long": 14}


def test_no_more_than_max_num_seqs_run() -> None:
    driver = connected(max_num_seqs=2)
    driver.feed(*(add(create_request(name, max_tokens=1)) for name in "abc"))
    assert list(driver.scheduled()) == ["a", "b"]
    driver.complete()
    assert list(driver.scheduled()) == ["c"]


def test_the_head_of_the_queue_is_not_overtaken_by_a_smaller_request() -> None:
    driver = connected(num_blocks=4)
    driver.feed(add(create_request("a", prompt=range(9))))
    driver.feed(add(create_request("big", prompt=range(8))), add(create_request("small")))
    driver.complete()
    assert list(driver.scheduled()) == ["a"]


def test_blocks_grow_with_the_tokens_and_are_free_at_the_end() -> None:
    driver = connected()
    driver.feed(add(create_request(prompt=[1, 2, 3], max_tokens=6)))
    sizes = []
    while driver.core.requests:
        sizes.append(len(driver.plans[-1].sequences[0].block_table))
        driver.complete()
    assert sizes == [1, 1, 2, 2, 2, 2]
    assert driver.core.snapshot()["num_free_blocks"] == 16


def test_the_newest_is_preempted_and_recomputed_from_prompt_and_output() -> None:
    driver = connected(num_blocks=4)
    driver.feed(*(add(create_request(name, prompt=range(7), max_tokens=8)) for name in "ab"))
    driver.complete(lambda sequence: 100 + ord(sequence.request_id))
    driver.complete(lambda sequence: 200 + ord(sequence.request_id))
    assert driver.scheduled() == {"a": 1}, "b gave its blocks to a"
    assert driver.core.snapshot()["num_preemptions"] == 1
    while "b" not in driver.scheduled():
        driver.complete()
    (sequence,) = driver.plans[-1].sequences
    assert sequence.token_ids == (0, 1, 2, 3, 4, 5, 6, 100 + ord("b"), 200 + ord("b"))
    assert sequence.start == 0 and sequence.sample
    while driver.core.requests:
        driver.complete()
    assert [m.first_index for m in driver.generated("b")] == list(range(8))


def test_a_preempted_request_is_served_before_those_who_waited() -> None:
    driver = connected(num_blocks=4, max_num_seqs=2)
    driver.feed(*(add(create_request(name, prompt=range(7), max_tokens=8)) for name in "abc"))
    driver.complete()
    driver.complete()
    assert [request.request_id for request in driver.core.batch.waiting] == ["b", "c"]


def test_everything_that_arrived_together_shares_the_next_step() -> None:
    driver = connected()
    driver.feed(*(add(create_request(name)) for name in "abc"))
    assert len(driver.plans) == 1 and list(driver.scheduled()) == ["a", "b", "c"]
    driver.complete()
    assert sum(isinstance(message, TokensGenerated) for message in driver.replies) == 3


def test_one_step_is_outstanding_at_a_time() -> None:
    driver = connected()
    driver.feed(add(create_request("a")))
    driver.feed(add(create_request("b")))
    assert len(driver.plans) == 1
    driver.complete()
    assert len(driver.plans) == 2 and driver.plans[1].step_id == driver.plans[0].step_id + 1
