"""The process around the core: who may say what, over real sockets and real owner locks, in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bus.config import HeartbeatConfig, PodConfig, PrefillConfig, TopologyConfig
from bus.control import endpoints
from bus.control.lock import OwnerLock
from bus.control.member import Member
from bus.control.messages import (
    AbortPrefill,
    Message,
    OffersEnded,
    PrefillCompleted,
    PrefillFailed,
    StepCompleted,
    StepPlan,
    WithdrawOffers,
)
from bus.control.sockets import Dealer, Router
from bus.errors import ConfigError, ProtocolError
from services.peers import Peer
from services.shell import process
from services.shell.process import ShellProcess, shell_main, shell_settings
from tests.harness.poll import async_eventually
from tests.harness.shelling import create_task, prefill_ready
from tests.harness.toy_offers import ToyPrefillWorker

TIMEOUT_S = 10.0


@pytest.fixture
def config(tmp_path: Path) -> PodConfig:
    return PodConfig(
        pod="unit",
        runtime_dir=str(tmp_path / "r"),
        topology=TopologyConfig(prefill_workers=2),
        heartbeat=HeartbeatConfig(lock_poll_interval_ms=10),
    )


@pytest.fixture
async def shell(config: PodConfig) -> AsyncIterator[ShellProcess]:
    member = Member(config, "shell", 0)
    router = Router(member.socket_endpoint, process._FROM_PEERS)
    shell = ShellProcess(config, member, router)
    task = asyncio.create_task(shell.run())
    try:
        yield shell
        assert not task.done(), task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        router.close()
        await member.stop()


class Caller:
    """A scheduler or a prefill worker: an owner lock and a DEALER."""

    def __init__(self, config: PodConfig, shell: ShellProcess, service: str, expected: object) -> None:
        self.lock = OwnerLock.acquire(endpoints.lock_path(config, service, 0))
        self.name = f"{service}-0.{self.lock.incarnation}"
        self._dealer = Dealer(shell._router.endpoint, self.name.encode(), expected)

    async def say(self, message: Message) -> None:
        await async_eventually(lambda: self._dealer.send(message), timeout_s=TIMEOUT_S, what="connected")

    async def hear(self) -> Message:
        async with asyncio.timeout(TIMEOUT_S):
            return await self._dealer.recv()

    def die(self) -> None:
        self._dealer.close()
        self.lock.release()


@pytest.fixture
def callers(config: PodConfig, shell: ShellProcess) -> Iterator[list[Caller]]:
    made: list[Caller] = []
    yield made
    for caller in made:
        caller.die()


def scheduler(config: PodConfig, shell: ShellProcess, callers: list[Caller]) -> Caller:
    callers.append(Caller(config, shell, "scheduler", PrefillCompleted | PrefillFailed))
    return callers[-1]


def worker(config: PodConfig, shell: ShellProcess, callers: list[Caller]) -> Caller:
    callers.append(Caller(config, shell, "prefill", StepPlan | WithdrawOffers))
    return callers[-1]


async def work(caller: Caller) -> None:
    """Do what a prefill worker does, until cancelled."""
    toy = ToyPrefillWorker(prefill_ready(0, caller.lock.incarnation))
    await caller.say(toy.ready)
    while True:
        match await caller.hear():
            case StepPlan() as plan:
                await caller.say(toy.run(plan))
            case WithdrawOffers(serials=serials):
                ended = toy.withdraw(serials)
                await caller.say(OffersEnded(incarnation=caller.lock.incarnation, serials=ended))


async def test_a_prompt_goes_to_the_worker_and_its_ticket_to_the_scheduler(
    config: PodConfig, shell: ShellProcess, callers: list[Caller]
) -> None:
    asker, executor = scheduler(config, shell, callers), worker(config, shell, callers)
    steps = asyncio.create_task(work(executor))
    await asker.say(create_task(1, range(30)))
    done = await asker.hear()
    assert isinstance(done, PrefillCompleted) and done.ticket.num_tokens == 30
    await asker.say(AbortPrefill(task_id=1))
    await async_eventually(lambda: shell.core.is_idle, timeout_s=TIMEOUT_S, what="the offer has ended")
    steps.cancel()
    assert shell.counters()["num_free_blocks"] == 16


async def test_a_dead_workers_prompt_goes_to_its_next_incarnation(
    config: PodConfig, shell: ShellProcess, callers: list[Caller]
) -> None:
    asker, first = scheduler(config, shell, callers), worker(config, shell, callers)
    await first.say(prefill_ready(0, first.lock.incarnation))
    await asker.say(create_task(1))
    assert isinstance(await first.hear(), StepPlan)
    first.die()
    steps = asyncio.create_task(work(worker(config, shell, callers)))
    done = await asker.hear()
    assert isinstance(done, PrefillCompleted) and done.ticket.incarnation == first.lock.incarnation + 1
    steps.cancel()


async def test_a_dead_schedulers_tasks_are_forgotten(
    config: PodConfig, shell: ShellProcess, callers: list[Caller]
) -> None:
    asker = scheduler(config, shell, callers)
    await asker.say(create_task(1))
    await async_eventually(lambda: not shell.core.is_idle, timeout_s=TIMEOUT_S, what="it is known")
    asker.die()
    await async_eventually(lambda: shell.core.is_idle, timeout_s=TIMEOUT_S, what="it is forgotten")


async def test_a_reply_that_cannot_be_sent_ends_the_task(
    config: PodConfig, shell: ShellProcess, callers: list[Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    asker, executor = scheduler(config, shell, callers), worker(config, shell, callers)
    send = shell._router.send

    def refuse_completed(identity: bytes, message: Message) -> bool:
        if isinstance(message, PrefillCompleted):
            raise ProtocolError("too large")
        return send(identity, message)

    monkeypatch.setattr(shell._router, "send", refuse_completed)
    steps = asyncio.create_task(work(executor))
    await asker.say(create_task(1))
    failed = await asker.hear()
    assert isinstance(failed, PrefillFailed) and (failed.code, failed.retryable) == ("too_large", False)
    await async_eventually(lambda: shell.core.is_idle, timeout_s=TIMEOUT_S, what="the offer has ended")
    steps.cancel()


@pytest.mark.parametrize(
    ("peer", "message", "is_heard"),
    [
        (Peer("scheduler", 0, 1), create_task(), True),
        (Peer("scheduler", 1, 9), AbortPrefill(task_id=1), True),
        (Peer("scheduler", 2, 1), create_task(), False),
        (Peer("prefill", 0, 1), create_task(), False),
        (Peer("prefill", 0, 1), prefill_ready(0, 1), True),
        (Peer("prefill", 0, 2), prefill_ready(0, 1), False),
        (Peer("prefill", 1, 1), prefill_ready(0, 1), False),
        (Peer("prefill", 2, 1), prefill_ready(2, 1), False),
        (Peer("scheduler", 0, 1), prefill_ready(0, 1), False),
        (Peer("attention", 0, 1), OffersEnded(incarnation=1, serials=()), False),
        (Peer("prefill", 0, 1), OffersEnded(incarnation=1, serials=()), True),
        (Peer("prefill", 0, 2), OffersEnded(incarnation=1, serials=()), False),
        (Peer("prefill", 0, 1), StepCompleted(step_id=1, incarnation=1, sampled=()), True),
    ],
)
async def test_each_peer_may_say_only_what_is_its_own(
    shell: ShellProcess, peer: Peer, message: Message, is_heard: bool
) -> None:
    assert (shell.event_of(peer, message) is not None) == is_heard


def test_a_policy_that_does_not_exist_is_refused(config: PodConfig) -> None:
    wrong = PodConfig(topology=config.topology, prefill=PrefillConfig(policy="best"))
    with pytest.raises(ConfigError, match=r"prefill.policy = 'best': must be one of cost, round_robin"):
        shell_settings(wrong, 1)


async def test_there_is_one_shell_and_only_with_prefill_workers(config: PodConfig) -> None:
    with pytest.raises(ConfigError, match="shell-0"):
        await shell_main(config, 1)
    with pytest.raises(ConfigError, match="prefill_workers"):
        await shell_main(PodConfig(), 0)
