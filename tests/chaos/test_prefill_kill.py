"""kill -9 while prompts are computed elsewhere: every stream gets the oracle's tokens, and nothing stays behind.

The moment: some prompts are done and decoded, others are being computed or wait for it, and KV is on its way.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.chaos.test_kill import assert_healed
from tests.conftest import GOLDENS
from tests.harness.client import Stream, stream_completion
from tests.harness.oracle import expected_tokens
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import async_eventually, eventually

FOLDER = GOLDENS / "deepseek_v3"
NUM_STREAMS = 10
MAX_TOKENS = 24
PROMPT_TOKENS = 90
ALONE, SHARED = "alone", "shared"  # each worker has all experts, or they share them


@pytest.fixture(scope="module", params=[ALONE, SHARED])
def pod(request: pytest.FixtureRequest) -> Iterator[Pod]:
    overrides = {
        "topology.prefill_workers": 2,
        "prefill.tokens_min": 24,
        "prefill.max_num_batched_tokens": 16,  # so that computing them all takes a while
        "prefill.expert_parallel": str(request.param == SHARED).lower(),
        "scheduler.max_num_seqs": 16,
    }
    flags = [part for name, value in overrides.items() for part in ("--set", f"{name}={value}")]
    with running_pod(FOLDER, *flags, dp_groups=2, expert_workers=2) as running:
        yield running


def prompt(seed: int, i: int) -> list[int]:
    """No two are alike, also between tests: nothing of them is cached."""
    return [(seed * 31 + 7 * i + (3 + seed) * j) % 190 + 5 for j in range(PROMPT_TOKENS + 5 * i)]


async def kill_in_mid_prefill(pod: Pod, service: str, index: int, seed: int) -> None:
    victim = await asyncio.to_thread(pod.member, service, index)
    streams: dict[int, Stream] = {}
    async with httpx.AsyncClient(base_url=pod.url, timeout=120) as client:

        async def one(i: int) -> Stream:
            def remember(stream: Stream) -> None:
                streams[i] = stream

            return await stream_completion(
                client, prompt(seed, i), max_tokens=MAX_TOKENS, ignore_eos=True, on_tokens=remember
            )

        tasks = [asyncio.create_task(one(i)) for i in range(NUM_STREAMS)]
        await async_eventually(lambda: streams, timeout_s=30, what="a first token", interval_s=0.001)
        os.kill(victim["pid"], signal.SIGKILL)
        killed_at, num_begun = time.monotonic(), len(streams)
        results = await asyncio.gather(*tasks)
    assert num_begun < NUM_STREAMS, "some prompts must not be done at the kill"
    for i, stream in enumerate(results):
        assert stream.error is None, (service, i, stream.error)
        assert stream.token_ids == expected_tokens(FOLDER, prompt(seed, i), MAX_TOKENS), (service, i)
    await asyncio.to_thread(assert_healed, pod, victim, killed_at)
    await asyncio.to_thread(assert_all_free, pod)


def assert_all_free(pod: Pod) -> None:
    """Nobody holds a block any more, on either side; whoever was killed and is back counts from zero."""

    def free() -> bool:
        counters = [m["counters"] for m in pod.status()["members"] if m["service"] in ("scheduler", "shell")]
        return all(
            one.get("num_blocks", 0) == one.get("num_free_blocks", -1) and not one["num_waiting"]
            for one in counters
        )

    eventually(free, timeout_s=15, what="all blocks free", interval_s=0.2)


@pytest.mark.parametrize(
    ("service", "index", "seed"),
    [("shell", 0, 1), ("prefill", 0, 2), ("prefill", 1, 3), ("attention", 0, 4), ("scheduler", 1, 5)],
)
async def test_streams_survive_a_kill_in_mid_prefill(pod: Pod, service: str, index: int, seed: int) -> None:
    await kill_in_mid_prefill(pod, service, index, seed)
    served = await asyncio.to_thread(pod.member, "shell", 0)
    assert served["state"] == "ready"


async def test_prompts_are_computed_by_prefill_workers_afterwards(pod: Pod) -> None:
    """What was killed takes part again, instead of leaving all to the DP groups."""

    def completed() -> int:
        return int(pod.member("shell", 0)["counters"].get("num_completed_tasks", 0))

    before = await asyncio.to_thread(completed)
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        stream = await stream_completion(client, prompt(9, 1), max_tokens=4, ignore_eos=True)
    assert stream.token_ids == expected_tokens(FOLDER, prompt(9, 1), 4)
    await asyncio.to_thread(
        eventually, lambda: completed() > before, timeout_s=10, what="one more task", interval_s=0.2
    )
