"""The next step is planned from counts while one is under way: what it may hold, and what becomes of overshoot."""

from __future__ import annotations

from typing import Any

from bus.control.messages import DRAWN_BEFORE, AbortRequest, StepFailed, StepPlan
from services.scheduler.events import ExecutorLost, FromGateway, Tick
from tests.harness.scheduling import GATEWAY, Driver, add, connected, create_request

STOP = 99


def ahead_driver(**changes: Any) -> Driver:
    return connected(async_scheduling=True, **changes)


def planned(plan: StepPlan) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {one.request_id: (one.start, one.token_ids) for one in plan.sequences}


def test_the_next_step_is_sent_at_once_and_goes_on_with_what_will_be_drawn() -> None:
    driver = ahead_driver()
    driver.feed(add(create_request(prompt=[1, 2, 3])))
    first, second = driver.plans
    assert planned(first) == {"a": (0, (1, 2, 3))}
    assert planned(second) == {"a": (3, (DRAWN_BEFORE,))}
    assert second.step_id == first.step_id + 1
    assert second.sequences[0].sample
    driver.feed(driver.answer(first, lambda _: 50))
    assert planned(driver.plans[2]) == {"a": (4, (DRAWN_BEFORE,))}
    assert [m.token_ids for m in driver.generated()] == [(50,)]
    assert len(driver.plans) == 3, "two steps are outstanding"


def test_the_last_token_by_count_is_followed_by_nothing() -> None:
    driver = ahead_driver()
    driver.feed(add(create_request(max_tokens=3)))
    for number in range(3):
        driver.feed(driver.answer(driver.plans[number], lambda _: 7))
    assert len(driver.plans) == 3
    assert driver.core.is_idle
    assert driver.generated()[-1].finish_reason == "length"
    assert driver.core.snapshot()["num_free_blocks"] == 16


def test_what_is_computed_after_a_stop_is_discarded_and_its_blocks_are_kept_until_then() -> None:
    driver = ahead_driver(num_blocks=2)
    driver.feed(add(create_request(prompt=[1, 2, 3], stop_token_ids=(STOP,))))
    first, second = driver.plans
    driver.feed(driver.answer(first, lambda _: STOP))
    assert driver.generated()[-1].finish_reason == "stop"
    assert driver.core.is_idle
    assert driver.core.snapshot()["num_free_blocks"] == 1, "the second step still writes one"
    driver.feed(add(create_request("b", prompt=range(8), max_tokens=0, prompt_logprobs=0)))
    assert len(driver.plans) == 2
    driver.feed(driver.answer(second))
    assert len(driver.generated()) == 1
    assert planned(driver.plans[2]) == {"b": (0, tuple(range(8)))}


def test_others_go_on_ahead_beside_one_that_stopped() -> None:
    driver = ahead_driver()
    driver.feed(add(create_request("a", stop_token_ids=(STOP,))), add(create_request("b")))
    first, second = driver.plans
    assert set(planned(second)) == {"a", "b"}
    driver.feed(driver.answer(first, lambda one: STOP if one.request_id == "a" else 7))
    assert set(planned(driver.plans[2])) == {"b"}
    num_free = driver.core.snapshot()["num_free_blocks"]
    for plan in driver.plans[1:3]:  # at the latest when both that followed are over
        driver.feed(driver.answer(plan))
    assert driver.core.snapshot()["num_free_blocks"] == num_free + 1, (
        "of a, whose block nobody writes any more"
    )
    assert len(driver.generated("a")) == 1
    assert len(driver.generated("b")) == 3


def test_nothing_is_planned_ahead_while_a_prompt_is_in_chunks() -> None:
    driver = ahead_driver()
    driver.feed(add(create_request(prompt=range(20))))
    assert len(driver.plans) == 1
    driver.complete()
    assert [sorted(planned(plan)["a"][1])[0] for plan in driver.plans] == [0, 16, DRAWN_BEFORE]


def test_a_newcomer_joins_when_the_steps_under_way_are_over() -> None:
    driver = ahead_driver()
    driver.feed(add(create_request("a", max_tokens=9)))
    driver.feed(add(create_request("b")))
    assert len(driver.plans) == 2
    driver.feed(driver.answer(driver.plans[0]))
    assert len(driver.plans) == 2, "nothing ahead while somebody could be admitted"
    driver.feed(driver.answer(driver.plans[1]))
    assert planned(driver.plans[2]) == {"a": (4, (7,)), "b": (0, (1, 2, 3))}
    assert set(planned(driver.plans[3])) == {"a", "b"}


def test_who_waits_without_a_seat_does_not_keep_others_from_going_ahead() -> None:
    driver = ahead_driver(max_num_seqs=1)
    driver.feed(add(create_request("a")), add(create_request("b")))
    assert len(driver.plans) == 2


def test_nobody_is_preempted_for_a_step_ahead() -> None:
    driver = ahead_driver(num_blocks=2)
    driver.feed(add(create_request("a", prompt=[1, 2, 3, 4], max_tokens=4)), add(create_request("b")))
    assert len(driver.plans) == 1, "a needs a block that only b has"
    driver.complete()
    assert driver.core.snapshot()["num_preemptions"] == 1


def test_penalties_get_all_output_with_the_token_to_come() -> None:
    driver = ahead_driver()
    driver.feed(add(create_request(frequency_penalty=0.5, min_tokens=2)))
    assert [plan.sequences[0].output_token_ids for plan in driver.plans] == [(), (DRAWN_BEFORE,)]
    driver.feed(driver.answer(driver.plans[0], lambda _: 50))
    assert driver.plans[2].sequences[0].output_token_ids == (50, DRAWN_BEFORE)
    assert [plan.sequences[0].allow_stop for plan in driver.plans] == [False, False, True]


def test_an_abort_frees_its_blocks_when_both_steps_are_over() -> None:
    driver = ahead_driver()
    driver.feed(add(create_request("a")))
    driver.feed(FromGateway(GATEWAY, AbortRequest(request_id="a", attempt=0)))
    first, second = driver.plans
    driver.feed(driver.answer(first))
    assert driver.core.snapshot()["num_free_blocks"] == 15
    driver.feed(driver.answer(second))
    assert driver.core.snapshot()["num_free_blocks"] == 16
    assert driver.core.is_idle


def test_a_failed_step_takes_the_one_after_it_along() -> None:
    driver = ahead_driver()
    driver.feed(add(create_request("a")))
    for plan, code in zip(driver.plans[:2], ("experts_away", "nothing_drawn"), strict=True):
        driver.feed(StepFailed(step_id=plan.step_id, incarnation=1, code=code, message=""))
    assert [message.code for message in driver.replies if hasattr(message, "code")] == ["experts_away"]
    assert driver.core.snapshot()["num_free_blocks"] == 16


def test_an_executor_lost_with_two_steps_counts_as_one_loss() -> None:
    driver = ahead_driver(max_num_losses=2)
    driver.feed(add(create_request("a")))
    driver.feed(ExecutorLost(1, "dead"))
    assert not driver.core.is_idle
    driver.connect(2)
    assert planned(driver.plans[2]) == {"a": (0, (1, 2, 3))}


def test_a_step_ahead_is_not_overdue_because_the_one_before_was_slow() -> None:
    driver = ahead_driver()
    driver.feed(add(create_request("a")))
    driver.now_ns = 999
    driver.feed(driver.answer(driver.plans[0]))
    driver.now_ns = 1500
    driver.feed(Tick())
    assert driver.core.executor.connected is not None
    driver.now_ns = 2000
    driver.feed(Tick())
    assert driver.core.executor.connected is None
