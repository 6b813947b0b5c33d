"""A pod that idles, is used, and is left: what it costs and what stays behind."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import GOLDENS
from tests.harness.client import Stream, stream_completion
from tests.harness.idling import excesses, sleeping, watch
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import async_eventually, eventually

IDLE_INTERVAL_S = 4.0
IDLE_WAKE_UPS_MAX = 100.0  # a second, of all processes together; it is about 80


def pids(pod: Pod) -> list[int]:
    return [m["pid"] for m in pod.status()["members"]]


def free_blocks(pod: Pod) -> int:
    return sum(
        m["counters"]["num_free_blocks"] for m in pod.status()["members"] if m["service"] == "scheduler"
    )


def num_descriptors(pod: Pod) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids(pod))


def test_an_idle_pod_seldom_wakes_and_nobody_spins(qwen_pod: Pod) -> None:
    members = {f"{m['service']}-{m['index']}": m["pid"] for m in qwen_pod.status()["members"]}
    processes = {**members, "launcher": qwen_pod.launcher.pid}
    with sleeping() as sleepers:
        # The best of three: the pod may still be settling.
        for _ in range(3):
            used, slept = watch(processes, sleepers, IDLE_INTERVAL_S)
            if not (found := excesses(used, slept, IDLE_INTERVAL_S, IDLE_WAKE_UPS_MAX)):
                return
    raise AssertionError("\n".join(found))


async def test_a_client_that_leaves_frees_its_blocks_within_a_second(qwen_pod: Pod) -> None:
    pod = qwen_pod
    eventually(lambda: all_idle(pod), timeout_s=10)
    all_free = free_blocks(pod)
    seen = asyncio.Event()

    def on_tokens(stream: Stream) -> None:
        seen.set()

    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        task = asyncio.create_task(
            stream_completion(client, [5] * 40, max_tokens=400, ignore_eos=True, on_tokens=on_tokens)
        )
        await asyncio.wait_for(seen.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    left = time.monotonic()
    await async_eventually(lambda: free_blocks(pod) == all_free, timeout_s=5, what="blocks free again")
    # `xds status` itself takes a while on a busy machine: the bound allows for one call.
    assert time.monotonic() - left < 2.0


def all_idle(pod: Pod) -> bool:
    return all(
        m["counters"]["num_running"] == m["counters"]["num_waiting"] == 0
        for m in pod.status()["members"]
        if m["service"] == "scheduler"
    )


async def test_requests_leave_no_descriptor_and_no_segment(qwen_pod: Pod) -> None:
    pod = qwen_pod
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        # Both DP groups meet every expert worker once: peers attach each other's segments lazily.
        await asyncio.gather(
            *(stream_completion(client, list(range(3, 60)), max_tokens=2, ignore_eos=True) for _ in range(8))
        )
    segments = sorted(p.name for p in Path("/dev/shm").glob(f"xds-{pod.name}-*"))
    before, processes = num_descriptors(pod), pids(pod)
    limit = asyncio.Semaphore(16)

    async def one(client: httpx.AsyncClient, i: int) -> Stream:
        async with limit:
            return await stream_completion(client, [3 + i % 50, 9], max_tokens=1 + i % 4, ignore_eos=True)

    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        streams = await asyncio.gather(*(one(client, i) for i in range(1000)))
    assert all(s.done and s.error is None for s in streams)
    assert pids(pod) == processes
    assert sorted(p.name for p in Path("/dev/shm").glob(f"xds-{pod.name}-*")) == segments
    eventually(
        lambda: num_descriptors(pod) <= before, timeout_s=15, what="descriptors as before", interval_s=0.5
    )


def test_a_second_pod_of_the_same_name_is_refused(qwen_pod: Pod) -> None:
    result = qwen_pod.xds("up", "--model", str(GOLDENS / "qwen3_moe"), "--port", "0")
    assert result.returncode == 3
    assert qwen_pod.name in result.stderr and "running" in result.stderr
    assert qwen_pod.status()["healthy"]


def test_a_port_in_use_is_named_and_nothing_is_left(qwen_pod: Pod) -> None:
    with (
        pytest.raises(AssertionError, match=f"{qwen_pod.port}.*in use"),
        running_pod(GOLDENS / "qwen3_moe", "--port", str(qwen_pod.port)),
    ):
        pass


def test_down_ends_a_pod_and_leaves_nothing() -> None:
    with running_pod(GOLDENS / "qwen3_moe", dp_groups=1, expert_workers=1) as pod:
        result = pod.xds("down")
        assert result.returncode == 0, result.stderr
        assert pod.launcher.wait(timeout=10) == 0
        assert pod.leftovers() == []
        assert pod.xds("status").returncode == 3
