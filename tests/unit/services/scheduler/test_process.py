"""The shell around the core: who may say what, over real sockets and real owner locks, in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from bus.config import HeartbeatConfig, KvConfig, PodConfig
from bus.control import endpoints
from bus.control.lock import OwnerLock
from bus.control.member import Member
from bus.control.messages import (
    AbortRequest,
    ExecutorReady,
    Message,
    RequestAccepted,
    RequestFailed,
    StepCompleted,
    StepFailed,
    StepPlan,
    TokensGenerated,
)
from bus.control.sockets import Dealer, Router
from bus.errors import ConfigError, ProtocolError
from services.peers import Peer, has_ended
from services.scheduler import process
from services.scheduler.events import ExecutorConnected, ExecutorLost, FromGateway, GatewayLost
from services.scheduler.process import SchedulerProcess, core_settings, scheduler_main
from tests.harness.poll import async_eventually
from tests.harness.scheduling import create_ready, create_request
from tests.harness.toy_executor import ToyExecutor, oracle_outputs

TIMEOUT_S = 10.0
TO_GATEWAY = RequestAccepted | TokensGenerated | RequestFailed


@pytest.fixture
def config(tmp_path: Path) -> PodConfig:
    return PodConfig(
        pod="unit",
        runtime_dir=str(tmp_path / "r"),
        kv=KvConfig(block_tokens=4, cache_tokens=64),
        heartbeat=HeartbeatConfig(lock_poll_interval_ms=10),
    )


@asynccontextmanager
async def serving(config: PodConfig) -> AsyncIterator[SchedulerProcess]:
    member = Member(config, "scheduler", 0)
    router = Router(member.socket_endpoint, process._FROM_PEERS)
    shell = SchedulerProcess(config, member, router)
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


@pytest.fixture
async def shell(config: PodConfig) -> AsyncIterator[SchedulerProcess]:
    async with serving(config) as shell:
        yield shell


class Caller:
    """A gateway or an attention worker: an owner lock and a DEALER."""

    def __init__(self, config: PodConfig, shell: SchedulerProcess, service: str, expected: object) -> None:
        self.lock = OwnerLock.acquire(endpoints.lock_path(config, service, 0))
        self.name = f"{service}-0.{self.lock.incarnation}"
        self._endpoint, self._expected = shell._router.endpoint, expected
        self._dealer = self.connect()

    def connect(self) -> Dealer:
        self._dealer = Dealer(self._endpoint, self.name.encode(), self._expected)
        return self._dealer

    def disconnect(self) -> None:
        self._dealer.close()

    async def say(self, message: Message) -> None:
        await async_eventually(lambda: self._dealer.send(message), timeout_s=TIMEOUT_S, what="connected")

    async def hear(self) -> Message:
        async with asyncio.timeout(TIMEOUT_S):
            return await self._dealer.recv()

    def die(self) -> None:
        self.disconnect()
        self.lock.release()


@pytest.fixture
def callers(config: PodConfig, shell: SchedulerProcess) -> Iterator[list[Caller]]:
    made: list[Caller] = []
    yield made
    for caller in made:
        caller.die()


def gateway(config: PodConfig, shell: SchedulerProcess, callers: list[Caller]) -> Caller:
    callers.append(Caller(config, shell, "gateway", TO_GATEWAY))
    return callers[-1]


def worker(config: PodConfig, shell: SchedulerProcess, callers: list[Caller]) -> Caller:
    callers.append(Caller(config, shell, "attention", StepPlan))
    return callers[-1]


async def serve_steps(caller: Caller, executor: ToyExecutor) -> None:
    await caller.say(executor.ready)
    while True:
        plan = await caller.hear()
        assert isinstance(plan, StepPlan)
        await caller.say(executor.run(plan))


def ready_of(caller: Caller) -> ExecutorReady:
    return create_ready(caller.lock.incarnation)


async def test_tokens_go_from_the_worker_to_the_gateway(
    config: PodConfig, shell: SchedulerProcess, callers: list[Caller]
) -> None:
    client = gateway(config, shell, callers)
    executor = worker(config, shell, callers)
    request = create_request(prompt=range(30), max_tokens=5)
    steps = asyncio.create_task(serve_steps(executor, ToyExecutor(ready_of(executor))))
    await client.say(request)
    assert isinstance(await client.hear(), RequestAccepted)
    answers = [await client.hear() for _ in range(5)]
    steps.cancel()
    tokens = [token for answer in answers for token in answer.token_ids]  # type: ignore[attr-defined]
    assert tokens == oracle_outputs(list(range(30)), request.sampling, 1000)
    assert shell.counters()["num_generated_tokens"] == 5
    assert shell.counters()["num_free_blocks"] == 16


async def test_the_next_worker_takes_over_when_the_owner_lock_is_free(
    config: PodConfig, shell: SchedulerProcess, callers: list[Caller]
) -> None:
    client, first = gateway(config, shell, callers), worker(config, shell, callers)
    request = create_request()
    await first.say(ready_of(first))
    await client.say(request)
    assert isinstance(await first.hear(), StepPlan)
    first.die()
    await async_eventually(
        lambda: shell.core.executor.connected is None, timeout_s=TIMEOUT_S, what="the death is noticed"
    )
    second = worker(config, shell, callers)
    assert second.lock.incarnation == first.lock.incarnation + 1
    steps = asyncio.create_task(serve_steps(second, ToyExecutor(ready_of(second))))
    answers = [await client.hear() for _ in range(5)]
    steps.cancel()
    tokens = [token for answer in answers[1:] for token in answer.token_ids]  # type: ignore[attr-defined]
    assert tokens == oracle_outputs([1, 2, 3], request.sampling, 1000)


async def test_a_dead_gateways_requests_end(
    config: PodConfig, shell: SchedulerProcess, callers: list[Caller]
) -> None:
    client = gateway(config, shell, callers)
    await client.say(create_request())
    assert isinstance(await client.hear(), RequestAccepted)
    client.die()
    await async_eventually(lambda: shell.core.is_idle, timeout_s=TIMEOUT_S, what="its requests are gone")


async def test_a_gateway_that_cannot_be_reached_is_lost(
    config: PodConfig, shell: SchedulerProcess, callers: list[Caller]
) -> None:
    client = gateway(config, shell, callers)
    shell.post(FromGateway("gateway-7.1", create_request("orphan")))
    shell.post(FromGateway(client.name, create_request("mine")))
    await async_eventually(
        lambda: shell.counters()["num_aborted_requests"] > 0, timeout_s=TIMEOUT_S, what="the orphan is gone"
    )


async def test_a_living_worker_that_could_not_be_reached_is_tried_again(
    config: PodConfig, shell: SchedulerProcess, callers: list[Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "RECONNECT_NS", 1)
    client, executor = gateway(config, shell, callers), worker(config, shell, callers)
    executor.disconnect()
    name = executor.name.encode()
    await async_eventually(
        lambda: not shell._router.send(name, create_request()), timeout_s=TIMEOUT_S, what="the router sees it"
    )
    shell.post(ExecutorConnected(ready_of(executor)))
    await client.say(create_request(max_tokens=1))
    await async_eventually(
        lambda: shell.counters()["num_executors_lost"] > 0, timeout_s=TIMEOUT_S, what="it was not reached"
    )
    executor.connect()
    assert isinstance(await executor.hear(), StepPlan), "although it did not greet again"


async def test_a_reply_that_cannot_be_sent_ends_the_request(
    config: PodConfig, shell: SchedulerProcess, callers: list[Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = gateway(config, shell, callers)
    send = shell._router.send

    def refuse_accepted(identity: bytes, message: Message) -> bool:
        if isinstance(message, RequestAccepted):
            raise ProtocolError("too large")
        return send(identity, message)

    monkeypatch.setattr(shell._router, "send", refuse_accepted)
    await client.say(create_request())
    failed = await client.hear()
    assert isinstance(failed, RequestFailed) and (failed.code, failed.retryable) == ("too_large", False)
    await async_eventually(lambda: shell.core.is_idle, timeout_s=TIMEOUT_S, what="the request is gone")


# ---------------------------------------------------------------- who may say what


@pytest.mark.parametrize(
    ("peer", "message", "is_heard"),
    [
        (Peer("gateway", 0, 1), create_request(), True),
        (Peer("gateway", 3, 9), AbortRequest(request_id="a", attempt=0), True),
        (Peer("attention", 0, 1), create_request(), False),
        (Peer("attention", 0, 1), create_ready(1), True),
        (Peer("attention", 1, 1), create_ready(1), False),
        (Peer("attention", 0, 2), create_ready(1), False),
        (Peer("gateway", 0, 1), create_ready(1), False),
        (Peer("attention", 0, 1), StepCompleted(step_id=1, incarnation=1, sampled=()), True),
        (Peer("attention", 0, 2), StepCompleted(step_id=1, incarnation=1, sampled=()), False),
        (Peer("attention", 0, 1), StepFailed(step_id=1, incarnation=1, code="a", message="b"), True),
        (Peer("gateway", 0, 1), StepFailed(step_id=1, incarnation=1, code="a", message="b"), False),
    ],
)
async def test_each_peer_may_say_only_what_is_its_own(
    shell: SchedulerProcess, peer: Peer, message: Message, is_heard: bool
) -> None:
    assert (shell.event_of(peer, message) is not None) == is_heard


@pytest.mark.parametrize(
    ("identity", "peer"),
    [
        (b"gateway-0.7", Peer("gateway", 0, 7)),
        (b"attention-12.345", Peer("attention", 12, 345)),
        (b"gateway-00.7", None),
        (b"expert-0.1", None),
        (b"gateway-0", None),
        (b"gateway-0.7\n", None),
        (b"\x00\xff", None),
    ],
)
def test_only_members_have_names(identity: bytes, peer: Peer | None) -> None:
    assert Peer.parse(identity) == peer
    assert peer is None or peer.identity == identity


def test_an_incarnation_ends_with_its_lock_or_its_successor(config: PodConfig) -> None:
    endpoints.ensure_runtime_dir(config)
    path = endpoints.lock_path(config, "gateway", 0)
    assert has_ended(config, Peer("gateway", 0, 1)), "there never was one"
    first = OwnerLock.acquire(path)
    assert not has_ended(config, Peer("gateway", 0, 1))
    first.release()
    assert has_ended(config, Peer("gateway", 0, 1))
    second = OwnerLock.acquire(path)
    assert has_ended(config, Peer("gateway", 0, 1)) and not has_ended(config, Peer("gateway", 0, 2))
    second.release()


async def test_locks_of_the_living_post_nothing(config: PodConfig, shell: SchedulerProcess) -> None:
    lock = OwnerLock.acquire(endpoints.lock_path(config, "attention", 0))
    shell.core.handle(ExecutorConnected(create_ready(lock.incarnation)), now_ns=0)
    shell.look_at_locks()
    assert not any(isinstance(event, ExecutorLost | GatewayLost) for event in shell._events)
    lock.release()
    shell.look_at_locks()
    assert any(isinstance(event, ExecutorLost) for event in shell._events)


# ---------------------------------------------------------------- settings and entry


def test_the_core_is_told_what_the_configuration_says(config: PodConfig) -> None:
    settings = core_settings(config, 3)
    assert (settings.incarnation, settings.limits.cache_tokens, settings.limits.max_model_len) == (3, 64, 0)
    assert settings.step_timeout_ns == 70_000_000_000
    assert settings.executor_wait_ns == 60_000_000_000


async def test_an_index_beyond_the_topology_is_refused(config: PodConfig) -> None:
    with pytest.raises(ConfigError, match=r"--index = 2: must be below topology\.dp_groups = 2"):
        await scheduler_main(config, 2)


async def test_the_role_ends_cleanly_when_it_is_cancelled(config: PodConfig) -> None:
    task = asyncio.create_task(scheduler_main(config, 0))
    path = endpoints.lock_path(config, "scheduler", 0)
    await async_eventually(lambda: path.exists(), timeout_s=TIMEOUT_S, what="it has started")
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not list(endpoints.locks_dir(config).parent.glob("*.sock"))
    OwnerLock.acquire(path).release()
