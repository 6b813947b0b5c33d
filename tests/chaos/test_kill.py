"""kill -9 in mid-stream: every stream goes on with the oracle's tokens, the next incarnation serves, nothing leaks.

What each case asserts: the process with that pid died; another pid has the role at a higher incarnation; every client
got exactly the oracle's tokens, once; the pod is healthy again within a bound; no segment of a dead incarnation stays;
at the end of the pod nothing at all is left (`running_pod`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from services.model.reference import ReferenceModel
from tests.conftest import GOLDENS
from tests.harness.client import Stream, stream_completion
from tests.harness.oracle import expected_tokens
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import async_eventually, eventually, is_running
from tests.harness.sampling_cases import CASES, Case

FOLDER = GOLDENS / "deepseek_v3"
NUM_STREAMS = 7
MAX_TOKENS = 300
KILL_AFTER_TOKENS = 60  # over all streams: each is in its middle then
HEAL_S_MAX = 15.0
SERVICES = ["expert", "attention", "scheduler", "manager"]


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    with running_pod(FOLDER) as running:
        yield running


def prompt(i: int) -> list[int]:
    return [(7 * i + 3 * j) % 190 + 5 for j in range(4 + i)]


def sampling(i: int) -> Case:
    """Each stream samples in another way, so that seeds, positions, penalties and grammars survive too."""
    return CASES[i % len(CASES)]


def expected(i: int, model: Path | ReferenceModel) -> list[int]:
    return expected_tokens(model, prompt(i), MAX_TOKENS, seed=100 + i, **sampling(i).oracle)


async def kill_in_mid_stream(
    pod: Pod,
    service: str,
    index: int,
    sig: int = signal.SIGKILL,
    model: Path | ReferenceModel = FOLDER,
) -> None:
    """Start streams, signal the member once they run, and compare every token with those of `model`."""
    victim = pod.member(service, index)
    streams: dict[int, Stream] = {}
    async with httpx.AsyncClient(base_url=pod.url, timeout=120) as client:

        async def one(i: int) -> Stream:
            def remember(stream: Stream) -> None:
                streams[i] = stream

            return await stream_completion(
                client, prompt(i), max_tokens=MAX_TOKENS, ignore_eos=True, on_tokens=remember, seed=100 + i,
                **sampling(i).http,
            )  # fmt: skip

        tasks = [asyncio.create_task(one(i)) for i in range(NUM_STREAMS)]
        await async_eventually(
            lambda: sum(len(s.token_ids) for s in streams.values()) >= KILL_AFTER_TOKENS,
            timeout_s=30,
            what="streams in their middle",
            interval_s=0.002,
        )
        unfinished = sum(not task.done() for task in tasks)
        os.kill(victim["pid"], sig)
        killed_at = time.monotonic()
        results = await asyncio.gather(*tasks)
    assert unfinished == NUM_STREAMS, "the kill must hit the streams in their middle"
    for i, stream in enumerate(results):
        assert stream.error is None, (service, i, stream.error)
        assert stream.token_ids == expected(i, model), (service, sampling(i).name)
        assert stream.done and stream.finish_reason == "length"
    await asyncio.to_thread(assert_healed, pod, victim, killed_at)


def assert_healed(pod: Pod, victim: dict[str, object], killed_at: float) -> None:
    service, index = str(victim["service"]), int(str(victim["index"]))

    def healed() -> bool:
        status = pod.status()
        return bool(status["healthy"]) and any(
            m["service"] == service and m["index"] == index and m["incarnation"] > victim["incarnation"]
            for m in status["members"]
        )

    eventually(healed, timeout_s=HEAL_S_MAX, what=f"next incarnation of {service}-{index}", interval_s=0.1)
    assert time.monotonic() - killed_at < HEAL_S_MAX + 30
    successor = pod.member(service, index)
    assert successor["pid"] != victim["pid"]
    assert not is_running(int(str(victim["pid"])))
    dead_segment = f"xds-{pod.name}-{service}-{index}-{victim['incarnation']}"
    eventually(lambda: not Path("/dev/shm", dead_segment).exists(), timeout_s=5, what=f"{dead_segment} swept")


@pytest.mark.parametrize("service", SERVICES)
async def test_streams_survive_a_kill(pod: Pod, service: str) -> None:
    await kill_in_mid_stream(pod, service, index=0)


async def test_a_hung_worker_is_fenced_and_replaced() -> None:
    flags = ["--set", "heartbeat.hang_timeout_ms=1500", "--set", "xccl.stall_timeout_ms=1500"]
    with running_pod(FOLDER, *flags, dp_groups=1, expert_workers=2) as pod:
        await kill_in_mid_stream(pod, "expert", 1, signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize("service", SERVICES)
async def test_streams_survive_twenty_kills(pod: Pod, service: str) -> None:
    members = {"expert": 4, "attention": 2, "scheduler": 2, "manager": 1}[service]
    for round_number in range(20):
        await kill_in_mid_stream(pod, service, index=round_number % members)
