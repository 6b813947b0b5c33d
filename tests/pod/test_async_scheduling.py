"""A pod that plans steps ahead gives the oracle's tokens, stops where the oracle stops, and frees everything."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import GOLDENS
from tests.harness.client import Stream, stream_completion
from tests.harness.oracle import expected_tokens
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import eventually

MAX_TOKENS = 24


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Pod]]:
    folder = GOLDENS / request.param
    with running_pod(folder, dp_groups=1, expert_workers=2) as pod:
        yield folder, pod


def draw(seed: int, count: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(3, 200, count).tolist()
    return drawn


async def stream(pod: Pod, prompts: list[list[int]], **fields: object) -> list[Stream]:
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        return await asyncio.gather(
            *(stream_completion(client, prompt, max_tokens=MAX_TOKENS, **fields) for prompt in prompts)
        )


def scheduler(pod: Pod) -> dict[str, int]:
    counters: dict[str, int] = pod.member("scheduler", 0)["counters"]
    return counters


async def test_steps_are_planned_ahead_and_tokens_are_the_oracles(served: tuple[Path, Pod]) -> None:
    folder, pod = served
    prompts = [draw(seed, 5 + 7 * seed) for seed in range(4)]
    found = await stream(pod, prompts, ignore_eos=True)
    assert [one.token_ids for one in found] == [expected_tokens(folder, p, MAX_TOKENS) for p in prompts]
    eventually(lambda: scheduler(pod)["num_steps_ahead"] >= MAX_TOKENS // 2, timeout_s=10, what="steps ahead")


async def test_what_follows_a_stop_is_in_vain_and_leaves_nothing(served: tuple[Path, Pod]) -> None:
    folder, pod = served
    prompts = [draw(seed, 9) for seed in range(10, 14)]
    whole = [expected_tokens(folder, prompt, MAX_TOKENS) for prompt in prompts]
    stops = sorted({tokens[6 + 3 * i] for i, tokens in enumerate(whole)})
    found = await stream(pod, prompts, ignore_eos=True, stop_token_ids=stops)
    expected = [
        expected_tokens(folder, prompt, MAX_TOKENS, stop_token_ids=tuple(stops)) for prompt in prompts
    ]
    assert [one.token_ids for one in found] == expected
    assert any(len(tokens) < MAX_TOKENS for tokens in expected)
    num_blocks = scheduler(pod)["num_blocks"]
    eventually(lambda: scheduler(pod)["num_free_blocks"] == num_blocks, timeout_s=10, what="all blocks free")


async def test_penalties_look_at_tokens_that_were_drawn_after_the_plan(served: tuple[Path, Pod]) -> None:
    folder, pod = served
    prompts = [draw(seed, 9) for seed in range(20, 23)]
    fields = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3}
    found = await stream(pod, prompts, ignore_eos=True, **fields)
    expected = [expected_tokens(folder, prompt, MAX_TOKENS, **fields) for prompt in prompts]
    assert [one.token_ids for one in found] == expected
    assert expected != [expected_tokens(folder, prompt, MAX_TOKENS) for prompt in prompts]
