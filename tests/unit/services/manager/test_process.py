"""A real manager socket and real members, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from bus import config as settings
from bus.clock import Deadline
from bus.config import PodConfig
from bus.control import endpoints, messages, rpc
from bus.control.member import Member
from bus.control.podmap import find
from bus.control.sockets import Dealer
from bus.errors import ResourceError
from bus.shutdown import EXIT_FAILURE, EXIT_REFUSED, Shutdown, current_shutdown
from services.manager.process import ManagerProcess

SOON_MS = 5000
FAST = {
    "topology.dp_groups": "1",
    "topology.expert_workers": "1",
    "heartbeat.interval_ms": "20",
    "heartbeat.lock_poll_interval_ms": "10",
    "heartbeat.hang_timeout_ms": "200",
}


@pytest.fixture
def config(tmp_path: Path) -> PodConfig:
    return settings.load({**FAST, "runtime_dir": str(tmp_path), "pod": "unit"}, None, {})


def soon() -> Deadline:
    return Deadline.after_ms(SOON_MS)


@contextlib.asynccontextmanager
async def manager(config: PodConfig) -> AsyncIterator[ManagerProcess]:
    process = ManagerProcess(config)
    task = asyncio.create_task(process.run())
    await asyncio.sleep(0)  # a task that never began would not close its socket
    try:
        yield process
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def is_state(service: str, state: str, incarnation: int = 1) -> Callable[[messages.PodMap], bool]:
    def matches(pod_map: messages.PodMap) -> bool:
        member = find(pod_map, service, 0)
        return member is not None and (member.state, member.incarnation) == (state, incarnation)

    return matches


async def test_members_see_one_another_come_and_go(config: PodConfig) -> None:
    heard: list[int] = []
    async with manager(config), Member(config, "gateway", 0) as gateway:
        gateway.on_pod_map(lambda pod_map: heard.append(pod_map.epoch))
        async with Member(config, "expert", 0, segment="/s") as expert:
            await gateway.wait_for(is_state("expert", "starting"), soon())
            expert.set_state("ready")
            await gateway.wait_for(is_state("expert", "ready"), soon())
            seen = gateway.lookup("expert", 0)
            assert seen is not None and seen.segment == "/s"
            assert gateway.peer_alive("expert", 0)
        await gateway.wait_for(is_state("expert", "dead"), soon())
        assert not gateway.peer_alive("expert", 0)
        assert heard == sorted(set(heard))


async def test_addresses_may_come_later(config: PodConfig) -> None:
    async with (
        manager(config),
        Member(config, "expert", 0) as expert,
        Member(config, "gateway", 0) as gateway,
    ):
        await gateway.wait_for(is_state("expert", "starting"), soon())
        expert.segment = expert.segment_name
        expert.endpoint = expert.socket_endpoint
        expert.set_state("ready")
        await gateway.wait_for(is_state("expert", "ready"), soon())
        seen = gateway.lookup("expert", 0)
        assert seen is not None
        assert (seen.segment, seen.endpoint) == (expert.segment_name, expert.socket_endpoint)


async def test_members_may_start_before_the_manager(config: PodConfig) -> None:
    async with Member(config, "expert", 0) as expert:
        expert.set_state("ready")
        async with manager(config):
            await expert.wait_welcomed()
            await expert.wait_for(is_state("expert", "ready"), soon())


async def test_a_death_is_seen_without_any_message(config: PodConfig) -> None:
    async with manager(config), Member(config, "gateway", 0) as gateway:
        expert = Member(config, "expert", 0)
        await expert.start()
        await gateway.wait_for(is_state("expert", "starting"), soon())
        expert._lock.release()  # what the kernel does at SIGKILL
        await gateway.wait_for(is_state("expert", "dead"), soon())
        async with Member(config, "expert", 0):
            await gateway.wait_for(is_state("expert", "starting", incarnation=2), soon())
        await expert.stop()


async def test_the_manager_dies_and_the_next_one_knows_everybody(config: PodConfig) -> None:
    async with Member(config, "expert", 0) as expert, Member(config, "gateway", 0) as gateway:
        expert.set_state("ready")
        async with manager(config):
            held = await gateway.wait_for(is_state("expert", "ready"), soon())
        assert gateway.pod_map.epoch >= held.epoch  # the last map stays in force
        maps: list[messages.PodMap] = []
        gateway.on_pod_map(maps.append)
        async with manager(config):
            await gateway.wait_for(is_state("manager", "ready", incarnation=2), soon())
        assert all(is_state("expert", "ready")(pod_map) for pod_map in maps)


async def test_status_carries_counters_and_ages(config: PodConfig) -> None:
    async with manager(config), Member(config, "expert", 0, counters=lambda: {"expert_rows": 7}) as expert:
        expert.set_detail("loading weights 3/8")
        dealer = Dealer(endpoints.manager_endpoint(config), b"", messages.Status)
        question = messages.GetStatus(request_id="q")
        try:
            async with asyncio.timeout(SOON_MS / 1000):
                while True:
                    status = await rpc.request(dealer, question, messages.Status, soon())
                    member = find(status.pod_map, "expert", 0)
                    if member is not None and member.counters:
                        break
        finally:
            dealer.close()
    assert (member.counters, member.detail) == ({"expert_rows": 7}, "loading weights 3/8")
    assert 0 <= member.heartbeat_age_ms < SOON_MS


async def test_a_loop_that_is_not_vouched_for_sends_nothing(config: PodConfig) -> None:
    vouched = True
    async with manager(config), Member(config, "expert", 0, vouch=lambda: vouched) as expert:
        await expert.wait_for(is_state("expert", "starting"), soon())
        expert.set_state("ready")
        await expert.wait_for(is_state("expert", "ready"), soon())
        vouched = False
        sent: list[object] = []
        assert expert._dealer is not None
        send = expert._dealer.send
        expert._dealer.send = lambda message: sent.append(message) or send(message)  # type: ignore[method-assign,func-returns-value]
        for _ in range(5):
            await asyncio.sleep(config.heartbeat.interval_ms / 1000)
        assert sent == []
        vouched = True
        for _ in range(5):
            await asyncio.sleep(config.heartbeat.interval_ms / 1000)
        assert sent


async def test_a_member_without_news_sends_only_to_show_that_it_lives(tmp_path: Path) -> None:
    config = settings.load(
        {**FAST, "heartbeat.hang_timeout_ms": "60000", "runtime_dir": str(tmp_path)}, None, {}
    )
    async with manager(config), Member(config, "expert", 0) as expert:
        await expert.wait_for(is_state("expert", "starting"), soon())
        sent: list[object] = []
        assert expert._dealer is not None
        expert._dealer.send = lambda message: bool(sent.append(message)) or True  # type: ignore[method-assign,func-returns-value]
        for _ in range(16):
            await asyncio.sleep(config.heartbeat.interval_ms / 1000)
        assert 1 <= len(sent) <= 8


async def test_other_settings_are_refused(config: PodConfig, tmp_path: Path) -> None:
    other = settings.load(
        {**FAST, "runtime_dir": str(tmp_path), "pod": "unit", "kv.block_tokens": "8"}, None, {}
    )
    shutdown = Shutdown()
    current_shutdown.set(shutdown)
    async with manager(config), Member(other, "expert", 0) as expert:
        async with asyncio.timeout(SOON_MS / 1000):
            await shutdown.wait()
        assert "config_sha is" in expert.refusal
        assert shutdown.exit_code == EXIT_REFUSED
        assert expert.refusal in shutdown.reason


async def test_a_listener_that_fails_ends_the_process(config: PodConfig) -> None:
    def listener(_pod_map: messages.PodMap) -> None:
        raise ValueError("broken listener")

    shutdown = Shutdown()
    current_shutdown.set(shutdown)
    async with manager(config), Member(config, "expert", 0) as expert:
        expert.on_pod_map(listener)
        async with asyncio.timeout(SOON_MS / 1000):
            await shutdown.wait()
    assert shutdown.exit_code == EXIT_FAILURE
    assert "broken listener" in shutdown.reason


async def test_a_member_runs_once(config: PodConfig) -> None:
    async with Member(config, "expert", 0):
        with pytest.raises(ResourceError, match="expert-0 is already running"):
            Member(config, "expert", 0)


async def test_there_is_one_manager(config: PodConfig) -> None:
    async with manager(config):
        with pytest.raises(ResourceError, match="manager-0 is already running"):
            ManagerProcess(config)


def test_an_unknown_service_is_a_mistake(config: PodConfig) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        Member(config, "baker", 0)


async def test_names_carry_the_incarnation(config: PodConfig, tmp_path: Path) -> None:
    async with Member(config, "expert", 0):
        pass
    async with Member(config, "expert", 0) as expert:
        assert expert.identity == b"expert-0.2"
        assert expert.socket_endpoint == f"ipc://{tmp_path}/expert-0.2.sock"
        assert expert.segment_name == "/xds-unit-expert-0-2"
