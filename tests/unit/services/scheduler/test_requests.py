"""Admission, attempts, aborts, and when a request is over."""

from __future__ import annotations

import pytest

from bus.control.messages import (
    AbortRequest,
    RequestAccepted,
    RequestFailed,
    RequestRejected,
    SampledToken,
    StepCompleted,
    TokensGenerated,
)
from services.batching.admission import Limits
from services.scheduler.events import FromGateway, GatewayLost
from tests.harness.scheduling import GATEWAY, Driver, add, connected, create_core, create_request


def abort(request_id: str = "a", attempt: int = 0, gateway: str = GATEWAY) -> FromGateway:
    return FromGateway(gateway, AbortRequest(request_id=request_id, attempt=attempt))


def last_word(driver: Driver, request_id: str = "a") -> tuple[str, int, tuple[int, ...]]:
    message = driver.generated(request_id)[-1]
    return message.finish_reason, message.stop_token_id, message.token_ids


# ---------------------------------------------------------------- admission


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"prompt": []}, "invalid", "prompt_token_ids is empty"),
        ({"prompt": [-1]}, "invalid", "token id -1 must not be negative"),
        ({"prompt": [1000]}, "invalid", "token id 1000 must be below vocab_size 1000"),
        ({"outputs": [1000]}, "invalid", "token id 1000 must be below vocab_size 1000"),
        ({"max_tokens": -1}, "invalid", "max_tokens -1 must not be negative"),
        ({"min_tokens": 5}, "invalid", "min_tokens 5 must be between 0 and max_tokens 4"),
        ({"outputs": [1] * 5}, "invalid", "output_token_ids has 5 tokens; it must not exceed max_tokens 4"),
        ({"prompt": range(61)}, "too_long", "= 65 must not exceed max_model_len 64"),
    ],
)
def test_a_wrong_request_is_rejected_with_field_value_and_rule(change: dict, code: str, text: str) -> None:
    driver = connected()
    driver.feed(add(create_request(**change)))
    (message,) = driver.replies
    assert isinstance(message, RequestRejected) and message.code == code and text in message.message
    assert driver.core.is_idle


def test_what_can_never_fit_the_cache_is_too_long() -> None:
    driver = connected(num_blocks=4)
    driver.feed(add(create_request("fits", prompt=range(12))), add(create_request("not", prompt=range(13))))
    assert [type(message) for message in driver.replies] == [RequestAccepted, RequestRejected]
    assert "KV cache of 16 tokens" in driver.replies[1].message


def test_a_full_queue_rejects() -> None:
    driver = Driver(create_core(max_waiting_requests=2))
    driver.feed(*(add(create_request(name)) for name in "abc"))
    assert [type(m) for m in driver.replies] == [RequestAccepted, RequestAccepted, RequestRejected]
    assert driver.replies[-1].code == "queue_full"


def test_limits_that_an_executor_narrows_fail_the_accepted() -> None:
    driver = Driver(create_core(limits=Limits(max_model_len=1000)))
    driver.feed(add(create_request("a")), add(create_request("b", prompt=range(100))))
    driver.connect()
    failed = driver.replies[-1]
    assert isinstance(failed, RequestFailed)
    assert (failed.request_id, failed.code, failed.retryable) == ("b", "too_long", False)
    assert list(driver.scheduled()) == ["a"]


# ---------------------------------------------------------------- the end of a request


def test_eos_stops_and_is_the_last_token() -> None:
    driver = connected()
    driver.feed(add(create_request(eos_token_ids=(9,))))
    driver.complete(lambda _: 9)
    assert last_word(driver) == ("stop", 9, (9,))
    assert driver.core.is_idle


def test_ignore_eos_goes_on_but_stop_token_ids_still_stop() -> None:
    driver = connected()
    driver.feed(add(create_request(eos_token_ids=(9,), stop_token_ids=(8,), ignore_eos=True)))
    driver.complete(lambda _: 9)
    driver.complete(lambda _: 8)
    assert last_word(driver) == ("stop", 8, (8,))
    assert len(driver.generated()) == 2


def test_max_tokens_ends_with_length() -> None:
    driver = connected()
    driver.feed(add(create_request(max_tokens=2)))
    driver.complete()
    driver.complete()
    assert last_word(driver) == ("length", -1, (7,))


def test_min_tokens_masks_stops_until_enough_are_out() -> None:
    driver = connected()
    driver.feed(add(create_request(min_tokens=2, eos_token_ids=(9,))))
    masks = []
    for token in (1, 2, 9):
        masks.append(driver.plans[-1].sequences[0].allow_stop)
        driver.complete(lambda _, token=token: token)
    assert masks == [False, False, True]
    assert last_word(driver) == ("stop", 9, (9,))


def test_max_tokens_zero_finishes_at_once() -> None:
    driver = connected()
    driver.feed(add(create_request(max_tokens=0)))
    assert [type(message) for message in driver.replies] == [RequestAccepted, TokensGenerated]
    assert last_word(driver) == ("length", -1, ())
    assert not driver.plans


def test_max_tokens_zero_with_prompt_logprobs_prefills_without_sampling() -> None:
    driver = connected()
    driver.feed(add(create_request(prompt=range(20), max_tokens=0, prompt_logprobs=1)))
    while driver.core.requests:
        assert not driver.plans[-1].sequences[0].sample
        driver.complete()
    (message,) = driver.generated()
    assert [logprob.token_id for logprob in message.prompt_logprobs] == list(range(1, 20))
    assert (message.token_ids, message.finish_reason) == ((), "length")


def test_prompt_logprobs_are_gathered_over_chunks_and_sent_once() -> None:
    driver = connected()
    driver.feed(add(create_request(prompt=range(20), max_tokens=2, prompt_logprobs=0)))
    driver.complete()
    driver.complete()
    assert not driver.plans[-1].sequences[0].next_prompt_token_ids
    driver.complete()
    first, second = driver.generated()
    assert [logprob.token_id for logprob in first.prompt_logprobs] == list(range(1, 20))
    assert second.prompt_logprobs == ()


# ---------------------------------------------------------------- attempts


def test_the_same_attempt_again_is_accepted_and_not_doubled() -> None:
    driver = connected()
    driver.feed(add(create_request()))
    driver.feed(add(create_request()))
    assert [type(message) for message in driver.replies] == [RequestAccepted, RequestAccepted]
    while driver.core.requests:
        driver.complete()
    assert [message.first_index for message in driver.generated()] == [0, 1, 2, 3]


def test_a_later_attempt_replaces_the_running_one() -> None:
    driver = connected()
    driver.feed(add(create_request()))
    driver.feed(add(create_request(attempt=1, outputs=[5])))
    driver.complete(lambda _: 666)  # the answer to the replaced attempt
    assert not driver.generated()
    assert driver.plans[-1].sequences[0].token_ids == (1, 2, 3, 5)
    driver.complete(lambda _: 6)
    (message,) = driver.generated()
    assert (message.attempt, message.first_index, message.token_ids) == (1, 1, (6,))


def test_an_earlier_attempt_is_ignored() -> None:
    driver = connected()
    driver.feed(add(create_request(attempt=2)))
    assert not driver.feed(add(create_request(attempt=1)))
    assert driver.core.requests["a"].attempt == 2


def test_an_attempt_whose_tokens_are_all_out_finishes_at_once() -> None:
    driver = connected()
    driver.feed(add(create_request("full", outputs=[1, 2, 3, 4])))
    driver.feed(add(create_request("stopped", outputs=[1, 9], eos_token_ids=(9,))))
    assert last_word(driver, "full") == ("length", -1, ())
    assert last_word(driver, "stopped") == ("stop", 9, ())
    assert driver.generated("full")[0].first_index == 4
    assert driver.core.is_idle and not driver.plans


def test_an_attempt_with_tokens_gets_no_prompt_logprobs_again() -> None:
    driver = connected()
    driver.feed(add(create_request(outputs=[5], prompt_logprobs=1)))
    assert driver.plans[-1].sequences[0].next_prompt_token_ids == ()


# ---------------------------------------------------------------- aborts


def test_blocks_of_an_aborted_request_are_not_reused_until_its_step_is_over() -> None:
    driver = connected()
    driver.feed(add(create_request(prompt=range(10))))
    driver.feed(abort())
    assert driver.core.is_idle and driver.core.snapshot()["num_free_blocks"] == 13
    driver.complete()
    assert driver.core.snapshot()["num_free_blocks"] == 16
    assert not driver.generated()


def test_aborting_the_unknown_an_older_attempt_or_anothers_request_does_nothing() -> None:
    driver = connected()
    driver.feed(add(create_request(attempt=1)))
    driver.feed(abort("nobody"), abort(attempt=0), abort(attempt=1, gateway="gateway-1.1"))
    assert list(driver.core.requests) == ["a"]


def test_a_lost_gateways_requests_end_and_others_go_on() -> None:
    driver = connected()
    driver.feed(add(create_request("a")), add(create_request("b"), gateway="gateway-1.1"))
    driver.feed(GatewayLost(GATEWAY))
    assert list(driver.core.requests) == ["b"]
    driver.complete()
    assert list(driver.scheduled()) == ["b"]


@pytest.mark.parametrize("token_id", [-1, 1000])
def test_an_impossible_token_fails_only_its_request(token_id: int) -> None:
    driver = connected()
    driver.feed(add(create_request("a")), add(create_request("b")))
    driver.complete(lambda sequence: token_id if sequence.request_id == "a" else 7)
    failed = [message for message in driver.replies if isinstance(message, RequestFailed)]
    assert [(m.request_id, m.code, m.retryable) for m in failed] == [("a", "executor_protocol", True)]
    assert list(driver.core.requests) == ["b"]


def test_a_request_without_a_next_token_fails_alone_and_for_good() -> None:
    driver = connected()
    driver.feed(add(create_request("a")), add(create_request("b")))
    plan = driver.plans[-1]
    broken = SampledToken(request_id="a", token_id=-1, error="no token may follow the text")
    fine = SampledToken(request_id="b", token_id=7)
    driver.feed(StepCompleted(step_id=plan.step_id, incarnation=1, sampled=(broken, fine)))
    failed = [message for message in driver.replies if isinstance(message, RequestFailed)]
    assert [(m.request_id, m.code, m.retryable) for m in failed] == [("a", "no_token_left", False)]
    assert "may follow" in failed[0].message and list(driver.core.requests) == ["b"]


def test_earlier_tokens_travel_only_with_requests_that_look_at_them() -> None:
    driver = connected()
    driver.feed(
        add(create_request("plain", outputs=(8,))),
        add(create_request("frequency", outputs=(8,), frequency_penalty=0.5)),
        add(create_request("repetition", outputs=(8,), repetition_penalty=1.5)),
        add(create_request("grammar", outputs=(8,), grammar="start: x")),
    )
    sent = {s.request_id: (s.prompt_token_ids, s.output_token_ids) for s in driver.plans[-1].sequences}
    driver.complete()
    sent |= {s.request_id: (s.prompt_token_ids, s.output_token_ids) for s in driver.plans[-1].sequences}
    assert sent == {
        "plain": ((), ()),
        "frequency": ((), (8, 7)),
        "repetition": ((1, 2, 3), (8, 7)),
        "grammar": ((), (8, 7)),
    }


def test_an_answer_without_a_planned_request_fails_it() -> None:
    driver = connected()
    driver.feed(add(create_request()))
    driver.feed(StepCompleted(step_id=driver.plans[-1].step_id, incarnation=1, sampled=()))
    assert isinstance(driver.replies[-1], RequestFailed) and driver.core.is_idle
