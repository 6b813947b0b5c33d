"""A pod whose cost rule always picks trampolines answers with the same tokens, also after an expert worker's death."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import GOLDENS
from tests.harness.client import stream_completion
from tests.harness.oracle import expected_tokens
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import eventually

FOLDER = GOLDENS / "deepseek_v3"
PROMPTS = [list(range(3, 3 + length)) for length in (5, 17, 30)]


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    with running_pod(FOLDER, "--set", "xccl.route_costs_ns=1,1,1,0,0,0") as pod:
        yield pod


def total(pod: Pod, counter: str) -> int:
    members = [m for m in pod.status()["members"] if m["service"] == "attention"]
    return sum(m["counters"].get(counter, 0) for m in members)


async def check_tokens(pod: Pod) -> None:
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        for prompt in PROMPTS:
            stream = await stream_completion(client, prompt, max_tokens=9, ignore_eos=True)
            assert stream.token_ids == expected_tokens(FOLDER, prompt, 9)


async def test_every_exchange_goes_through_a_trampoline(pod: Pod) -> None:
    await check_tokens(pod)
    eventually(lambda: 0 < total(pod, "exchanges") == total(pod, "trampoline_exchanges"), timeout_s=10)


@pytest.mark.parametrize("index", [0, 3])
async def test_a_killed_expert_worker_costs_no_token(pod: Pod, index: int) -> None:
    """Expert workers 0 and 1 are trampolines of the two groups, 3 is none."""
    victim = next(m for m in pod.status()["members"] if (m["service"], m["index"]) == ("expert", index))
    os.kill(victim["pid"], signal.SIGKILL)
    await check_tokens(pod)
