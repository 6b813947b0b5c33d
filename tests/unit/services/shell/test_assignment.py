"""The pool: who is assigned to whom, and when; how a step's budget is used."""

from __future__ import annotations

from bus.control.messages import StepFailed
from services.shell.events import FromScheduler, FromWorker, Tick, WorkerConnected, WorkerLost
from services.shell.policies import POLICIES
from tests.harness.shelling import (
    SCHEDULER,
    VOCAB_SIZE,
    ShellDriver,
    create_shell,
    create_task,
    prefill_ready,
)


def test_tasks_stay_in_the_pool_while_all_workers_are_busy() -> None:
    driver = ShellDriver(create_shell(max_num_batched_tokens=4))
    driver.add(*(create_task(task_id, range(task_id, task_id + 8)) for task_id in range(1, 7)))
    # A worker takes at most a step's worth of shares ahead, so nobody is bound to it for long.
    assert len(driver.core.pool) == 2
    driver.connect(0, 2)
    assert [task.number for task in driver.core.pool] == [5, 6], "the order stays when a worker is lost"


def test_the_idle_worker_gets_the_next_prompt() -> None:
    driver = ShellDriver(create_shell(num_workers=2))
    driver.add(create_task(1, range(12)))
    driver.add(create_task(2, range(20, 32)))
    assert [driver.shares(0), driver.shares(1)] == [[12], [12]]


def test_the_worker_that_has_the_prefix_gets_the_prompt() -> None:
    driver = ShellDriver(create_shell(num_workers=2))
    driver.add(create_task(1, range(20, 24)), create_task(2, range(12)))
    driver.step(0)
    driver.step(1)
    driver.add(create_task(3, [*range(12), 50]))
    driver.step(1)
    assert driver.completed()[-1].ticket.index == 1
    assert driver.completed()[-1].num_cached_tokens == 12


def test_round_robin_does_not_look() -> None:
    driver = ShellDriver(create_shell(num_workers=2, policy=POLICIES["round_robin"]))
    driver.add(create_task(1, range(12)), create_task(2, range(12)))
    assert [driver.shares(0), driver.shares(1)] == [[12], [12]]


def test_a_long_prompt_shares_its_worker() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1, range(100, 140)))
    assert driver.shares() == [16], "alone it gets everything"
    driver.add(create_task(2, range(9)), create_task(3, range(50, 60)))
    driver.step()
    assert driver.shares() == [4, 9, 3], "then a quarter, and the shortest first"


def test_without_chunks_a_prompt_is_one_step() -> None:
    driver = ShellDriver(create_shell(enable_chunked_prefill=False))
    driver.add(create_task(1, range(100, 140)), create_task(2, range(9)))
    assert driver.shares() == [40]
    driver.step()
    assert driver.shares() == [9]
    assert [done.task_id for done in driver.completed()] == [1]


def test_long_prompts_go_to_their_own_workers_only() -> None:
    driver = ShellDriver(create_shell(num_workers=3, long_workers=1, long_tokens=10))
    driver.add(*(create_task(task_id, range(100 * task_id, 100 * task_id + 10)) for task_id in (1, 2, 3)))
    driver.add(*(create_task(task_id, range(100 * task_id, 100 * task_id + 9)) for task_id in (4, 5)))
    assert [driver.shares(index) for index in range(3)] == [[9], [9], [10, 6]]


def test_a_short_prompt_waits_for_a_short_worker_while_the_long_one_is_idle() -> None:
    core = create_shell(num_workers=2, long_workers=1, long_tokens=10)
    driver = ShellDriver(core)
    driver.feed(WorkerLost(0, 1, "dead"))
    driver.add(create_task(1, range(9)), create_task(2, range(10)))
    assert [task.is_long for task in core.pool] == [False]
    driver.now_ns += 500
    driver.feed(Tick())
    assert driver.failed() == [(1, "worker_absent", True)]
    driver.add(create_task(3, range(9)))
    driver.feed(Tick())
    assert driver.failed()[1:] == [(3, "worker_absent", True)], "by now it is clear that nobody comes"


def test_workers_that_share_the_experts_step_together() -> None:
    driver = ShellDriver(create_shell(num_workers=2, expert_parallel=True))
    driver.add(create_task(1, range(20)))
    assert [driver.shares(0), driver.shares(1)] == [[16], []]
    driver.step(0)
    assert driver.shares(0) == [16], "the other one has not done its part"
    driver.step(1)
    assert [driver.shares(0), driver.shares(1)] == [[4], []]
    driver.step(1)
    driver.step(0)
    assert len(driver.completed()) == 1


def test_a_step_that_others_gave_up_is_done_again() -> None:
    driver = ShellDriver(create_shell(num_workers=2, expert_parallel=True))
    driver.add(create_task(1, range(9)))
    failed = StepFailed(
        step_id=driver.plan(0).step_id, incarnation=1, code="experts_away", message="prefill-1"
    )
    driver.feed(WorkerLost(1, 1, "dead"))
    driver.feed(FromWorker(0, failed))
    assert len(driver.told) == 2, "nobody steps while one is away"
    driver.connect(1, 2)
    driver.step(1)
    driver.step(0)
    assert [done.task_id for done in driver.completed()] == [1]


def test_nobody_waits_for_ever_for_the_others() -> None:
    driver = ShellDriver(create_shell(num_workers=2, expert_parallel=True))
    driver.feed(WorkerLost(1, 1, "dead"))
    driver.add(create_task(1, range(9)))
    driver.now_ns += 500
    driver.feed(Tick())
    assert driver.failed() == [(1, "worker_absent", True)] and driver.core.is_idle


def test_blocks_gather_for_who_lacks_them() -> None:
    driver = ShellDriver(create_shell(max_num_seqs=8, enable_prefix_caching=False), num_blocks=8)
    driver.add(create_task(1, range(12)), create_task(2, range(12)))
    driver.step()
    driver.step()
    assert len(driver.completed()) == 2, "both are offered and hold 6 of 8 blocks"
    driver.add(create_task(3, range(20)), create_task(4, range(8)))
    assert len(driver.core.pool) == 2, "the younger one must not take what the older one waits for"
    driver.end(1)
    driver.step()
    driver.step()
    assert [done.task_id for done in driver.completed()] == [1, 2, 3]


def test_one_of_two_equal_prompts_waits_for_the_other() -> None:
    driver = ShellDriver(create_shell())
    driver.add(create_task(1, range(12)), create_task(2, range(12)), create_task(3, range(50, 53)))
    assert driver.shares() == [12, 3], "others may pass it"
    driver.step()
    assert driver.shares() == [4], "its last block is computed again, for its token is drawn from it"
    driver.step()
    first, _, second = driver.completed()
    assert second.num_cached_tokens == 8
    assert first.ticket.block_ids[:2] == second.ticket.block_ids[:2]
    assert first.ticket.block_ids[2] != second.ticket.block_ids[2], "an offered block is not exchanged"


def test_too_many_tasks_are_refused() -> None:
    driver = ShellDriver(create_shell(max_waiting_tasks=2, num_workers=1))
    driver.feed(WorkerLost(0, 1, "dead"))
    driver.add(*(create_task(task_id) for task_id in (1, 2, 3)))
    assert driver.failed() == [(3, "queue_full", True)]


def test_what_no_worker_can_ever_compute_is_refused() -> None:
    driver = ShellDriver(create_shell(), num_blocks=8)
    driver.add(create_task(1, range(33)), create_task(2, ()), create_task(3, (VOCAB_SIZE,)))
    assert driver.failed() == [(1, "too_long", False), (2, "invalid", False), (3, "invalid", False)]


def test_limits_that_become_known_later_count_too() -> None:
    core = create_shell()
    core.handle(FromScheduler(SCHEDULER, create_task(1, range(65))), now_ns=0)
    driver = ShellDriver(core)
    assert driver.failed() == [(1, "too_long", False)]


def test_a_worker_that_makes_no_sense_is_ignored() -> None:
    core = create_shell()
    for ready in (prefill_ready(num_blocks=0), prefill_ready(index=1)):
        assert core.handle(WorkerConnected(ready), now_ns=0) == []
    assert core.snapshot()["num_ignored_results"] == 2 and core.snapshot()["num_workers"] == 0
