"""Prompts that are computed elsewhere: who is handed over, when the KV is fetched, and what happens when that fails."""

from __future__ import annotations

from typing import Any

from bus.control.messages import (
    AbortPrefill,
    AbortRequest,
    AddPrefill,
    CancelFetch,
    FetchKv,
    KvFetched,
    KvTicket,
    PrefillCompleted,
    PrefillFailed,
    SampledToken,
)
from services.scheduler.events import (
    Event,
    ExecutorLost,
    FromGateway,
    LeaderFound,
    LeaderLost,
    SendToLeader,
    SendTransfer,
    Tick,
)
from tests.harness.scheduling import GATEWAY, Driver, add, connected, create_request

PROMPT = tuple(range(10))  # blocks of 4 tokens: two full ones and two tokens


class World(Driver):
    """Keeps what went to the leader and which transfers were asked for."""

    to_leader: list[AddPrefill | AbortPrefill]
    transfers: list[FetchKv | CancelFetch]

    def feed(self, *events: Event) -> list[Any]:
        instructions = super().feed(*events)
        self.to_leader = [i.message for i in instructions if isinstance(i, SendToLeader)]
        self.transfers = [i.message for i in instructions if isinstance(i, SendTransfer)]
        return instructions

    def offer(self, task: AddPrefill | AbortPrefill, token_id: int = 7, num_cached: int = 0) -> None:
        assert isinstance(task, AddPrefill)
        num_tokens = len(task.prompt_token_ids) + len(task.output_token_ids)
        ticket = KvTicket(
            index=0,
            incarnation=1,
            segment="/toy",
            slot=0,
            serial=task.task_id,
            num_tokens=num_tokens,
            block_ids=tuple(range(100, 100 + -(-num_tokens // 4))),
        )
        sampled = SampledToken(request_id=task.request_id, token_id=token_id)
        self.feed(
            PrefillCompleted(
                task_id=task.task_id, sampled=sampled, ticket=ticket, num_cached_tokens=num_cached
            )
        )

    def fetched(self, error: str = "") -> None:
        fetch = self.transfers[0]
        self.feed(KvFetched(fetch_id=fetch.fetch_id, incarnation=1, error=error))


def world(**changes: Any) -> World:
    driver = connected(**{"prefill_tokens_min": 4, **changes})
    made = World(driver.core)
    made.incarnation = 1
    made.feed(LeaderFound())
    return made


def test_a_long_prompt_is_handed_over_and_a_short_one_is_not() -> None:
    driver = world()
    driver.feed(add(create_request("a", PROMPT)), add(create_request("b", (1, 2, 3))))
    (task,) = driver.to_leader
    assert isinstance(task, AddPrefill) and task.prompt_token_ids == PROMPT
    assert [s.request_id for s in driver.plans[-1].sequences] == ["b"]


def test_the_first_token_goes_out_before_the_kv_moves_and_decode_begins_after() -> None:
    driver = world()
    driver.feed(add(create_request("a", PROMPT)))
    driver.offer(driver.to_leader[0], num_cached=8)
    (said,) = driver.generated("a")
    assert said.token_ids == (7,) and said.num_cached_tokens == 0  # prefix caching is off here
    (fetch,) = driver.transfers
    assert isinstance(fetch, FetchKv) and fetch.first_block == 0 and len(fetch.block_ids) == 3
    assert not driver.plans
    driver.fetched()
    (sequence,) = driver.plans[-1].sequences
    assert (sequence.start, sequence.token_ids, sequence.block_table) == (10, (7,), fetch.block_ids)
    assert not driver.to_leader, "an offer that was fetched is not withdrawn as well"


def test_what_is_cached_here_is_not_fetched() -> None:
    driver = world(enable_prefix_caching=True)
    for request_id, first_block in (("a", 0), ("b", 2)):
        # The second has a longer tail, so that enough is lacking.
        tail = (50, 51, 52, 53) if request_id == "b" else ()
        driver.feed(add(create_request(request_id, (*PROMPT[:8], *tail), max_tokens=1, ignore_eos=True)))
        task = driver.to_leader[0]
        driver.offer(task)  # one token is all that it wants: nothing is fetched
        assert driver.to_leader == [AbortPrefill(task_id=task.task_id)] and not driver.transfers
        driver.feed(add(create_request(f"{request_id}2", (*PROMPT[:8], *tail, 60, 61, 62, 63), max_tokens=2)))
        driver.offer(driver.to_leader[0])
        (fetch,) = driver.transfers
        assert isinstance(fetch, FetchKv) and fetch.first_block == first_block
        driver.fetched()
        driver.complete()
    assert not driver.core.requests


def test_without_blocks_the_fetch_is_deferred_until_somebody_ends() -> None:
    driver = world()
    tasks = []
    for request_id in "abc":  # 16 blocks of 4 tokens; each request holds 7 with its next token
        driver.feed(add(create_request(request_id, tuple(range(27)), max_tokens=2)))
        tasks.append(driver.to_leader[0])
    fetches = []
    for task in tasks:
        driver.offer(task)
        fetches += driver.transfers
    assert len(fetches) == 2, "two fit, one waits"
    driver.transfers = fetches
    driver.fetched()
    driver.complete()  # the first ends
    (fetch,) = driver.transfers
    assert fetch.fetch_id == driver.core.requests["c"].task_id


def test_a_lost_leader_leaves_the_work_here() -> None:
    driver = world()
    driver.feed(add(create_request("a", PROMPT)))
    driver.feed(LeaderLost())
    assert [s.request_id for s in driver.plans[-1].sequences] == ["a"] and driver.plans[-1].sequences[
        0
    ].start == 0


def test_after_failures_in_a_row_it_is_computed_here() -> None:
    driver = world()
    driver.feed(add(create_request("a", PROMPT)))
    for _ in range(3):
        task = driver.to_leader[-1]
        assert isinstance(task, AddPrefill)
        driver.feed(PrefillFailed(task_id=task.task_id, code="toy", message=""))
    assert [s.request_id for s in driver.plans[-1].sequences] == ["a"]


def test_a_failed_fetch_is_handed_over_again_and_repeats_no_token() -> None:
    driver = world()
    driver.feed(add(create_request("a", PROMPT)))
    first = driver.to_leader[0]
    driver.offer(first)
    driver.fetched(error="withdrawn")
    abort, again = driver.to_leader
    assert abort == AbortPrefill(task_id=first.task_id)
    assert isinstance(again, AddPrefill) and again.output_token_ids == (7,)
    driver.offer(again, token_id=8)
    assert [m.first_index for m in driver.generated("a")] == [0, 1]


def test_who_leaves_in_mid_transfer_has_it_cancelled_and_frees_everything() -> None:
    driver = world()
    driver.feed(add(create_request("a", PROMPT)))
    driver.offer(driver.to_leader[0])
    (fetch,) = driver.transfers
    driver.feed(FromGateway(GATEWAY, AbortRequest(request_id="a", attempt=0)))
    assert driver.transfers == [CancelFetch(fetch_id=fetch.fetch_id, scheduler_incarnation=1)]
    assert driver.to_leader == [AbortPrefill(task_id=fetch.fetch_id)]
    assert driver.core.snapshot()["num_free_blocks"] == 16
    driver.feed(KvFetched(fetch_id=fetch.fetch_id, incarnation=1, error="cancelled"))
    assert driver.core.is_idle


def test_an_executor_that_comes_back_cancels_before_it_gets_a_plan() -> None:
    driver = world()
    driver.feed(add(create_request("a", PROMPT)), add(create_request("b", (1, 2, 3))))
    driver.offer(driver.to_leader[0])
    (fetch,) = driver.transfers
    stale = driver.answer(driver.plans[-1])
    driver.now_ns = 1000
    driver.feed(Tick())  # the step is overdue; the executor counts as stalled
    instructions = driver.feed(stale)
    kinds = [type(getattr(i, "message", None)).__name__ for i in instructions]
    assert driver.transfers[0] == CancelFetch(fetch_id=fetch.fetch_id, scheduler_incarnation=1)
    assert kinds.index("CancelFetch") < kinds.index("StepPlan")


def test_a_lost_executor_takes_the_transfer_with_it() -> None:
    driver = world()
    driver.feed(add(create_request("a", PROMPT)))
    task = driver.to_leader[0]
    driver.offer(task)
    driver.feed(ExecutorLost(1, "toy"))
    assert driver.to_leader == [AbortPrefill(task_id=task.task_id)]
    driver.connect(2)
    (again,) = driver.to_leader
    assert isinstance(again, AddPrefill) and again.task_id > task.task_id
