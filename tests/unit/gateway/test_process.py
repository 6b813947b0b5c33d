"""The parts of the process that need no pod: the port, the link, the settings that become bounds."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from bus.config import GatewayConfig, PodConfig
from bus.control.messages import AddRequest, RequestAccepted, SamplingParams
from bus.control.sockets import Router
from bus.errors import ResourceError
from gateway import process
from gateway.events import SchedulerMessage
from gateway.links import scheduler_link
from tests.harness.poll import async_eventually


def test_a_port_in_use_is_a_resource_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ResourceError, match=rf"gateway\.port = {port} on 127\.0\.0\.1: Address already in use"
        ):
            process.bind(GatewayConfig(port=port))


def test_an_unknown_host_is_a_resource_error() -> None:
    with pytest.raises(ResourceError, match=r"no\.such\.host\.invalid"):
        process.bind(GatewayConfig(host="no.such.host.invalid"))


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")])
def test_any_port_and_the_url(host: str, shown: str) -> None:
    config = GatewayConfig(host=host, port=0)
    with process.bind(config) as listener:
        assert process.base_url(config, listener) == f"http://{shown}:{listener.getsockname()[1]}"


def test_bounds_follow_the_settings() -> None:
    limits = process.job_limits(PodConfig(gateway=GatewayConfig(retry_attempts_max=3, retry_window_ms=9)))
    assert (limits.retry_attempts_max, limits.retry_window_ms, limits.waiting_jobs_max) == (3, 9, 512)


async def test_a_link_carries_messages_both_ways(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s.sock"
    router = Router(endpoint, AddRequest)
    heard: asyncio.Queue[SchedulerMessage] = asyncio.Queue()
    link = scheduler_link(endpoint, b"gateway-0.1", heard.put_nowait)
    add = AddRequest(request_id="r", attempt=0, prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1))
    await async_eventually(lambda: link.send(add), timeout_s=10, what="connected")
    async with asyncio.timeout(10):
        identity, message = await router.recv()
        assert (identity, message) == (b"gateway-0.1", add)
        answer = RequestAccepted(request_id="r", attempt=0)
        router.send(identity, answer)
        assert await heard.get() == answer
    link.close()
    router.close()
