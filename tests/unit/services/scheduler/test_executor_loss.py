"""What the death, the hang and the return of the attention worker do to requests."""

from __future__ import annotations

from bus.control.messages import RequestFailed, StepFailed
from services.scheduler.events import ExecutorConnected, ExecutorLost, Tick
from tests.harness.scheduling import Driver, add, connected, create_core, create_ready, create_request


def lost(incarnation: int = 1, *, dead: bool = True) -> ExecutorLost:
    return ExecutorLost(incarnation, "test", dead)


def test_requests_wait_for_the_first_executor() -> None:
    driver = Driver(create_core())
    driver.feed(add(create_request()))
    assert not driver.plans
    driver.connect()
    assert list(driver.scheduled()) == ["a"]


def test_the_next_incarnation_computes_everything_again() -> None:
    driver = connected()
    driver.feed(add(create_request("a")), add(create_request("b")))
    driver.complete(lambda _: 50)
    driver.feed(lost())
    assert driver.core.snapshot()["num_running"] == 0 and driver.core.snapshot()["num_blocks"] == 0
    driver.connect(2)
    assert [s.token_ids for s in driver.plans[-1].sequences] == [(1, 2, 3, 50), (1, 2, 3, 50)]
    assert [s.request_id for s in driver.plans[-1].sequences] == ["a", "b"], "order of admission is kept"


def test_a_new_incarnation_is_the_death_of_the_old() -> None:
    driver = connected()
    driver.feed(add(create_request()))
    old_plan = driver.plans[-1]
    driver.connect(2)
    assert driver.plans[-1].step_id == old_plan.step_id + 1
    driver.incarnation = 1
    assert not driver.feed(driver.answer(old_plan))
    assert driver.core.snapshot()["num_ignored_results"] == 1
    assert not driver.generated()


def test_a_repeated_ready_changes_nothing() -> None:
    driver = connected()
    driver.feed(add(create_request()))
    assert not driver.feed(ExecutorConnected(create_ready(1)))


def test_the_dead_do_not_come_back() -> None:
    driver = connected()
    driver.feed(add(create_request()))
    driver.feed(lost())
    assert not driver.feed(ExecutorConnected(create_ready(1)))
    assert not driver.complete()


def test_the_death_of_an_older_incarnation_does_not_touch_the_new() -> None:
    driver = connected()
    driver.connect(2)
    driver.feed(add(create_request()), lost(1))
    assert list(driver.scheduled()) == ["a"]


def test_an_overdue_step_is_given_up_and_its_late_result_brings_the_executor_back() -> None:
    driver = connected()
    driver.feed(add(create_request()))
    plan = driver.plans[-1]
    driver.now_ns = 999
    assert not driver.feed(Tick())
    driver.now_ns = 1000
    driver.feed(Tick())
    assert driver.core.snapshot()["num_executors_lost"] == 1
    driver.feed(driver.answer(plan, lambda _: 666))
    assert not driver.generated(), "the result itself is void"
    assert driver.plans[-1].step_id == plan.step_id + 1
    driver.complete(lambda _: 50)
    assert driver.generated()[0].token_ids == (50,)


def test_a_broken_connection_is_healed_by_the_same_incarnation() -> None:
    driver = connected()
    driver.feed(add(create_request()))
    driver.feed(lost(dead=False))
    driver.connect(1)
    assert len(driver.plans) == 2


def test_a_stalled_executor_that_dies_stays_dead() -> None:
    driver = connected()
    driver.feed(add(create_request()))
    plan = driver.plans[-1]
    driver.feed(lost(dead=False), lost())
    assert not driver.feed(driver.answer(plan))
    assert not driver.feed(ExecutorConnected(create_ready(1)))


def test_requests_fail_retryably_when_no_executor_comes() -> None:
    driver = Driver(create_core())
    driver.feed(add(create_request("early")))
    driver.now_ns = 400
    driver.feed(add(create_request("late")))
    driver.now_ns = 500
    driver.feed(Tick())
    (failed,) = [message for message in driver.replies if isinstance(message, RequestFailed)]
    assert (failed.request_id, failed.code, failed.retryable) == ("early", "executor_absent", True)
    assert list(driver.core.requests) == ["late"]


def test_a_failed_step_fails_its_requests_retryably_and_no_others() -> None:
    driver = connected(max_num_seqs=1)
    driver.feed(add(create_request("a")), add(create_request("b")))
    plan = driver.plans[-1]
    driver.feed(
        StepFailed(step_id=plan.step_id, incarnation=1, code="peer_died", message="expert-1 stayed away")
    )
    failed = driver.replies[-1]
    assert isinstance(failed, RequestFailed)
    assert (failed.request_id, failed.code, failed.retryable) == ("a", "peer_died", True)
    assert list(driver.scheduled()) == ["b"]


def test_a_request_that_keeps_killing_executors_is_failed_for_good() -> None:
    driver = connected(max_num_losses=3)
    driver.feed(add(create_request("poison")))
    for incarnation in (2, 3):
        driver.connect(incarnation)
        assert list(driver.core.requests) == ["poison"]
    driver.connect(4)
    failed = driver.replies[-1]
    assert isinstance(failed, RequestFailed) and (failed.code, failed.retryable) == ("executor_lost", False)


def test_a_step_that_succeeds_clears_the_suspicion() -> None:
    driver = connected(max_num_losses=2)
    driver.feed(add(create_request(max_tokens=40)))
    for incarnation in range(2, 12):
        driver.complete()
        driver.connect(incarnation)
    assert len(driver.generated()) == 10


def test_step_ids_of_two_scheduler_incarnations_never_meet() -> None:
    first, second = Driver(create_core(incarnation=1)), Driver(create_core(incarnation=2))
    for driver in (first, second):
        driver.connect()
        driver.feed(add(create_request()))
    assert second.plans[0].step_id - first.plans[0].step_id == 1 << 20
    assert second.plans[0].scheduler_incarnation == 2


def test_an_executor_with_impossible_numbers_is_not_used() -> None:
    driver = Driver(create_core())
    driver.feed(add(create_request()))
    assert not driver.feed(ExecutorConnected(create_ready(num_blocks=0)))
    assert driver.core.snapshot()["num_ignored_results"] == 1
