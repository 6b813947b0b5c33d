"""KV transfers between steps: what the hot loop's messages do, and when it works on what."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from bus.control import messages
from bus.control.messages import (
    CancelFetch,
    ExecutorReady,
    FetchKv,
    KvFetched,
    KvTicket,
    Message,
    OffersEnded,
    PlannedSequence,
    StepCompleted,
    StepPlan,
    WithdrawOffers,
)
from bus.control.sockets import Router
from bus.garbage import ManagedGc
from bus.memory.segment import segment_prefix, sweep, total_bytes
from services.steps import transfers
from services.steps.executor import StepExecutor
from services.steps.hot_loop import HotLoop
from services.steps.offers import OFFERS_POLL_MS, Offers
from services.steps.transfers import IDLE_POLL_MS, KvFetches
from tests.harness.poll import async_eventually
from tests.harness.transfer_world import BLOCK_BYTES, SinkSide, SourceSide

BLOCK_TOKENS = 16


@pytest.fixture
def pod() -> Iterator[str]:
    name = f"unit{uuid.uuid4().hex[:12]}"
    yield name
    sweep(segment_prefix(name))
    assert total_bytes(segment_prefix(name)) == 0


@pytest.fixture
def prefill(pod: str) -> Iterator[SourceSide]:
    side = SourceSide(pod)
    yield side
    side.close()


@pytest.fixture
def decode() -> Iterator[SinkSide]:
    side = SinkSide()
    yield side
    side.close()


def fetch(ticket: KvTicket, *, fetch_id: int = 1, block_ids: tuple[int, ...], planner: int = 1) -> FetchKv:
    return FetchKv(
        fetch_id=fetch_id, scheduler_incarnation=planner, ticket=ticket, first_block=0, block_ids=block_ids
    )


def sequence(num_tokens: int, block_table: tuple[int, ...]) -> PlannedSequence:
    tokens = tuple(range(num_tokens))
    return PlannedSequence(
        request_id="a", token_ids=tokens, start=0, block_table=block_table, sample=True, offer_kv=True
    )


def test_what_is_planned_elsewhere_is_fetched_slice_by_slice(
    prefill: SourceSide, decode: SinkSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "SLICE_BYTES", BLOCK_BYTES)
    side = KvFetches(decode.sink, 7)
    assert side.progress() == IDLE_POLL_MS and side.outgoing() == []
    side.handle(fetch(prefill.source.offer([3, 1], 32), block_ids=(0, 2)))
    assert side.progress() == 0 and side.outgoing() == []
    assert side.progress() == IDLE_POLL_MS
    assert side.outgoing() == [KvFetched(fetch_id=1, incarnation=7)]
    assert decode.blocks[:3, 0].tolist() == [4, 0, 2]
    assert side.counters() == {
        "kv_fetches": 1,
        "kv_blocks_fetched": 2,
        "kv_bytes_fetched": 2 * BLOCK_BYTES,
    }


def test_a_cancelled_fetch_is_answered_and_a_reset_is_not(prefill: SourceSide, decode: SinkSide) -> None:
    side = KvFetches(decode.sink, 7)
    ticket = prefill.source.offer([3], 1)
    side.handle(fetch(ticket, block_ids=(0,)))
    side.handle(CancelFetch(fetch_id=1, scheduler_incarnation=1))
    side.handle(CancelFetch(fetch_id=2, scheduler_incarnation=1))
    assert side.outgoing() == [KvFetched(fetch_id=1, incarnation=7, error="cancelled")]
    side.handle(fetch(ticket, block_ids=(0,)))
    side.reset()
    assert side.progress() == IDLE_POLL_MS and side.outgoing() == []
    assert not decode.blocks.any()


def test_an_idle_worker_lets_go_of_dead_sources(prefill: SourceSide, decode: SinkSide) -> None:
    side = KvFetches(decode.sink, 7)
    side.handle(fetch(prefill.source.offer([3], 1), block_ids=(0,)))
    prefill.segment.close()
    side.progress()
    assert side.outgoing() == [KvFetched(fetch_id=1, incarnation=7)]
    assert decode.sink.num_mapped == 0


def test_offers_hold_the_blocks_of_their_tokens_and_end_once(prefill: SourceSide, decode: SinkSide) -> None:
    offers = Offers(prefill.source, 5)
    assert offers.progress() == IDLE_POLL_MS
    fetched = offers.offer(sequence(17, (4, 2, 6)), BLOCK_TOKENS)
    withdrawn = offers.offer(sequence(16, (5, 7)), BLOCK_TOKENS)
    assert (fetched.block_ids, fetched.num_tokens) == ((4, 2), 17)
    assert (withdrawn.block_ids, withdrawn.num_tokens) == ((5,), 16)
    assert offers.progress() == OFFERS_POLL_MS and offers.outgoing() == []
    assert decode.fetch(fetched, [0, 1]) == ""
    offers.handle(WithdrawOffers(scheduler_incarnation=1, serials=(withdrawn.serial, 99)))
    (ended,) = offers.outgoing()
    assert isinstance(ended, OffersEnded) and ended.incarnation == 5
    assert sorted(ended.serials) == [fetched.serial, withdrawn.serial]
    assert offers.outgoing() == [] and offers.progress() == IDLE_POLL_MS
    assert offers.counters() == {
        "kv_offers": 2,
        "kv_blocks_offered": 3,
        "kv_blocks_sent": 2,
        "kv_bytes_sent": 2 * BLOCK_BYTES,
    }


def test_another_leader_hears_nothing_of_earlier_offers(prefill: SourceSide) -> None:
    offers = Offers(prefill.source, 5)
    ticket = offers.offer(sequence(1, (0,)), BLOCK_TOKENS)
    offers.reset()
    assert offers.outgoing() == [] and prefill.source.num_standing == 0
    again = offers.offer(sequence(1, (0,)), BLOCK_TOKENS)
    assert again.serial != ticket.serial
    offers.close()
    assert prefill.source.num_standing == 0


# ------------------------------------------------------------------ in the hot loop


class StepsOnly:
    """Stands for the executor: a step is what it is told to be."""

    def __init__(self) -> None:
        self.experts = SimpleNamespace(wanted=lambda: True)

    def run(self, plan: StepPlan, incarnation: int) -> StepCompleted:
        return StepCompleted(step_id=plan.step_id, incarnation=incarnation, sampled=())


class Planner:
    """Stands for a scheduler: one incarnation after another."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.incarnation = 0
        self.router: Router | None = None
        self.peer = b""
        self.member: messages.Member | None = None

    async def begin(self) -> None:
        """Begin another incarnation, and wait until it is greeted."""
        self.close()
        self.incarnation += 1
        self.router = Router(
            f"ipc://{self._folder}/p{self.incarnation}", ExecutorReady | KvFetched | StepCompleted
        )
        self.member = messages.Member(
            service="scheduler",
            index=0,
            incarnation=self.incarnation,
            pid=1,
            state="ready",
            endpoint=self.router.endpoint,
        )
        self.peer, message = await self.router.recv()
        assert isinstance(message, ExecutorReady)

    def say(self, message: Message) -> None:
        """Send it to the executor."""
        assert self.router is not None and self.router.send(self.peer, message)

    async def hear(self) -> Message:
        """Return the next message that is no greeting."""
        assert self.router is not None
        while True:
            _, message = await self.router.recv()
            if not isinstance(message, ExecutorReady):
                return message

    def close(self) -> None:
        """End the incarnation."""
        if self.router is not None:
            self.router.close()


@pytest.fixture
def loop_of(
    prefill: SourceSide, decode: SinkSide, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Planner]:
    """A planner whose executor runs a real hot loop with `decode` as its receiving side."""
    planner = Planner(str(tmp_path_factory.mktemp("hot")))
    ready = ExecutorReady(
        index=0, incarnation=7, num_blocks=8, block_tokens=BLOCK_TOKENS, max_model_len=64, vocab_size=9
    )
    loop = HotLoop(
        cast("StepExecutor", StepsOnly()),
        prefill.segment,
        ready,
        identity=b"attention-0.7",
        scheduler=lambda: planner.member,
        garbage=ManagedGc("auto"),
        transfers=KvFetches(decode.sink, 7),
    )
    failures: list[BaseException] = []
    loop.on_failure = failures.append
    loop.start()
    yield planner
    loop.stop(10)
    planner.close()
    assert failures == []


async def test_the_hot_loop_fetches_between_steps_and_answers(
    loop_of: Planner, prefill: SourceSide, decode: SinkSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "SLICE_BYTES", 64)
    await loop_of.begin()
    loop_of.say(fetch(prefill.source.offer([3, 1], 32), block_ids=(0, 2)))
    loop_of.say(StepPlan(step_id=1, scheduler_incarnation=1, sequences=()))
    heard = [await loop_of.hear(), await loop_of.hear()]
    assert KvFetched(fetch_id=1, incarnation=7) in heard
    assert any(isinstance(message, StepCompleted) for message in heard)
    assert decode.blocks[:3, 0].tolist() == [4, 0, 2]


async def test_transfers_of_an_earlier_planner_are_over_when_the_next_is_greeted(
    loop_of: Planner, prefill: SourceSide, decode: SinkSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "SLICE_BYTES", 0)  # nothing is ever copied
    await loop_of.begin()
    ticket = prefill.source.offer([3], 1)
    loop_of.say(fetch(ticket, block_ids=(0,)))
    await async_eventually(lambda: decode.sink.num_active == 1, timeout_s=20)
    await loop_of.begin()
    assert decode.sink.num_active == 0
    loop_of.say(fetch(ticket, fetch_id=5, block_ids=(0,)))  # of the one before: ignored
    monkeypatch.setattr(transfers, "SLICE_BYTES", 64)
    loop_of.say(fetch(ticket, fetch_id=6, block_ids=(1,), planner=2))
    assert await loop_of.hear() == KvFetched(fetch_id=6, incarnation=7)
    assert decode.blocks[:2, 0].tolist() == [0, 4]
