"""What becomes of a prompt that is computed, and of one that is lost or not wanted any more."""

from __future__ import annotations

import msgspec

from bus.control.messages import AbortPrefill, StepFailed
from services.shell.events import FromScheduler, FromWorker, SchedulerLost, Tick, WorkerConnected, WorkerLost
from tests.harness.shelling import SCHEDULER, ShellDriver, create_shell, create_task


def abort(task_id: int, scheduler: str = SCHEDULER) -> FromScheduler:
    return FromScheduler(scheduler, AbortPrefill(task_id=task_id))


def free_blocks(driver: ShellDriver) -> int:
    return driver.core.snapshot()["num_free_blocks"]


def test_blocks_are_kept_until_the_offer_has_ended() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1, range(30)))
    driver.step()
    assert not driver.completed()
    driver.step()
    (done,) = driver.completed()
    assert (done.task_id, done.sampled.request_id, done.ticket.num_tokens) == (1, "request-1", 30)
    assert free_blocks(driver) == 8
    driver.end(done.ticket.serial)
    assert free_blocks(driver) == 16 and driver.core.is_idle


def test_prompt_logprobs_of_all_chunks_come_together() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1, range(30), prompt_logprobs=0))
    driver.step()
    driver.step()
    (done,) = driver.completed()
    assert [one.token_id for one in done.sampled.prompt_logprobs] == list(range(1, 30))


def test_a_task_that_draws_nothing_is_offered_too() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1, range(5), max_tokens=0, prompt_logprobs=0))
    driver.step()
    assert driver.completed()[0].sampled.token_id == -1


def test_a_task_is_known_once() -> None:
    driver = ShellDriver(create_shell())
    task = create_task(1)
    driver.add(task, task)
    driver.step()
    driver.add(task)
    assert len(driver.completed()) == 2 and driver.completed()[0] == driver.completed()[1]
    driver.end(1)
    driver.add(task)
    assert driver.core.is_idle, "a repetition that comes late begins nothing"


def test_two_schedulers_may_use_the_same_numbers() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1, range(5)))
    driver.add(create_task(1, range(5)), scheduler="scheduler-1.1")
    driver.step()
    driver.step()
    assert [done.task_id for done in driver.completed()] == [1, 1]


def test_an_offer_that_nobody_wants_is_withdrawn() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1))
    driver.step()
    driver.feed(abort(1))
    assert driver.withdrawn() == [1] and free_blocks(driver) == 15, "its reader may still be at it"
    driver.end(1)
    assert free_blocks(driver) == 16


def test_a_task_aborted_in_mid_step_is_withdrawn_when_it_is_offered() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1), create_task(2, range(20)))
    driver.feed(abort(1), abort(2))
    driver.step()
    assert not driver.completed() and driver.withdrawn() == [1]
    driver.end(1)
    assert driver.core.is_idle and free_blocks(driver) == 16, "the unfinished one is gone as well"


def test_a_task_aborted_before_its_step_is_just_gone() -> None:
    driver = ShellDriver(create_shell(max_num_seqs=1))
    driver.add(create_task(1), create_task(2))
    driver.feed(abort(2))
    assert driver.core.snapshot()["num_waiting"] == 0


def test_a_lost_schedulers_tasks_end() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1))
    driver.step()
    driver.add(create_task(2), create_task(3, range(9)))
    driver.feed(SchedulerLost(SCHEDULER))
    driver.step()
    assert sorted(driver.withdrawn()) == [1, 2, 3] and len(driver.completed()) == 1
    driver.end(1, 2, 3)
    assert driver.core.is_idle


def test_a_lost_workers_prompts_are_computed_by_the_next() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1))
    driver.step()
    driver.add(create_task(2, range(30)))
    driver.step()
    driver.feed(WorkerLost(0, 1, "dead"))
    assert driver.failed() == [(1, "worker_lost", True)]
    driver.connect(0, 2)
    driver.step()
    driver.step()
    assert [done.task_id for done in driver.completed()] == [1, 2]


def test_another_worker_takes_over() -> None:
    driver = ShellDriver(create_shell(num_workers=2))
    driver.add(create_task(1, range(30)))
    driver.feed(WorkerLost(0, 1, "dead"))
    driver.step(1)
    driver.step(1)
    assert driver.completed()[0].ticket.index == 1


def test_who_kills_worker_after_worker_is_given_up() -> None:
    driver = ShellDriver(create_shell(max_num_losses=2))
    driver.add(create_task(1))
    for incarnation in (1, 2):
        driver.feed(WorkerLost(0, incarnation, "dead"))
        driver.connect(0, incarnation + 1)
    assert driver.failed() == [(1, "executor_lost", False)]


def test_a_stalled_workers_offers_are_withdrawn_before_it_computes_again() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1))
    driver.step()
    driver.add(create_task(2, range(30)))
    driver.now_ns += 1000
    driver.feed(Tick())
    assert driver.failed() == [(1, "worker_lost", True)]
    late = driver.workers[0].run(driver.plan())
    before = len(driver.told)
    driver.feed(FromWorker(0, late))
    kinds = [type(message).__name__ for _, message in driver.told[before:]]
    assert kinds[0] == "WithdrawOffers" and kinds[-1] == "StepPlan" and driver.withdrawn() == [1]


def test_an_offer_of_a_forgotten_step_is_withdrawn() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1))
    driver.now_ns += 1000
    driver.feed(Tick())
    driver.feed(FromWorker(0, driver.workers[0].run(driver.plan())))
    assert driver.withdrawn() == [1] and not driver.completed()


def test_a_worker_that_could_not_be_reached_is_not_dead() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1))
    driver.feed(WorkerLost(0, 1, "unreachable", dead=False))
    driver.feed(WorkerConnected(driver.workers[0].ready))
    driver.step()
    assert len(driver.completed()) == 1


def test_a_failed_steps_tasks_fail() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1))
    failed = StepFailed(step_id=driver.plan().step_id, incarnation=1, code="bad_plan", message="no")
    driver.feed(FromWorker(0, failed))
    assert driver.failed() == [(1, "bad_plan", True)] and driver.core.is_idle


def test_a_ticket_must_be_for_what_was_computed() -> None:
    for change in ({"num_tokens": 2}, {"block_ids": (9,)}, {"incarnation": 2}, {"index": 3}):
        driver = ShellDriver(create_shell())
        driver.add(create_task(1))
        result = driver.workers[0].run(driver.plan())
        ticket = msgspec.structs.replace(result.sampled[0].ticket, **change)  # type: ignore[type-var]
        sampled = msgspec.structs.replace(result.sampled[0], ticket=ticket)
        driver.feed(FromWorker(0, msgspec.structs.replace(result, sampled=(sampled,))))
        assert driver.failed() == [(1, "executor_protocol", True)] and driver.withdrawn() == [1]


def test_an_answer_without_a_ticket_is_refused() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1))
    result = driver.workers[0].run(driver.plan())
    sampled = msgspec.structs.replace(result.sampled[0], ticket=None)
    driver.feed(FromWorker(0, msgspec.structs.replace(result, sampled=(sampled,))))
    assert driver.failed() == [(1, "executor_protocol", True)]


def test_a_token_that_cannot_be_drawn_ends_the_task() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1))
    result = driver.workers[0].run(driver.plan())
    sampled = msgspec.structs.replace(result.sampled[0], ticket=None, token_id=-1, error="grammar")
    driver.feed(FromWorker(0, msgspec.structs.replace(result, sampled=(sampled,))))
    assert driver.failed() == [(1, "no_token_left", False)]
