"""Long requests go to executors and groups of their own, and come through at the lengths that the paper names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from services.bench.checkpoint import LONG_WINDOW, add_tokenizer, write_random
from tests.conftest import GOLDENS
from tests.harness.client import Stream, stream_completion
from tests.harness.oracle import expected_tokens
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import eventually

FOLDER = GOLDENS / "qwen3_moe"
LONG_TOKENS = 600
LONG_PROMPT_TOKENS = 96 * 1024
LONG_OUTPUT_TOKENS = 32 * 1024 - 64


def settings(values: dict[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def draw(seed: int, count: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(3, 200, count).tolist()
    return drawn


def counters(pod: Pod, service: str, index: int) -> dict[str, int]:
    found: dict[str, int] = pod.member(service, index)["counters"]
    return found


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    """Two DP groups and two prefill workers; of each the second is for long requests."""
    values = {
        "topology.prefill_workers": 2,
        "topology.long_dp_groups": 1,
        "prefill.long_workers": 1,
        "prefill.long_tokens": LONG_TOKENS,
        "gateway.long_tokens": LONG_TOKENS,
        "prefill.tokens_min": 16,
    }
    with running_pod(FOLDER, *settings(values), dp_groups=2, expert_workers=1) as running:
        yield running


async def stream(pod: Pod, prompts: list[list[int]], max_tokens: int) -> list[Stream]:
    async with httpx.AsyncClient(base_url=pod.url, timeout=900) as client:
        body: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True}
        return await asyncio.gather(*(stream_completion(client, prompt, **body) for prompt in prompts))


async def test_long_and_short_requests_never_share_a_worker(pod: Pod) -> None:
    long = [draw(i, 700 + 100 * i) for i in range(3)]
    short = [draw(10 + i, 40 + 5 * i) for i in range(8)]
    answers = await stream(pod, long + short, 8)
    for prompt, answer in zip(long + short, answers, strict=True):
        assert answer.error is None and answer.token_ids == expected_tokens(FOLDER, prompt, 8)

    def computed() -> tuple[int, int]:
        return tuple(counters(pod, "prefill", i)["computed_tokens"] for i in range(2))  # type: ignore[return-value]

    eventually(
        lambda: sum(computed()) == sum(map(len, long + short)), timeout_s=10, what="all prompts counted"
    )
    assert computed() == (sum(map(len, short)), sum(map(len, long)))
    generated = [counters(pod, "scheduler", i)["num_generated_tokens"] for i in range(2)]
    assert generated == [8 * len(short), 8 * len(long)]


@pytest.mark.slow
async def test_96k_in_and_32k_out(tmp_path: Path) -> None:
    """Minutes: attention over 96 Ki tokens is quadratic on a CPU too. Its first tokens are the oracle's."""
    write_random(tmp_path, changes=LONG_WINDOW)
    add_tokenizer(tmp_path)
    values = {
        "topology.prefill_workers": 2,
        "topology.long_dp_groups": 1,
        "prefill.long_workers": 1,
        "prefill.max_num_batched_tokens": 1024,
        "prefill.cache_tokens": 131_072,
        "kv.cache_tokens": 131_072,
    }
    prompt = draw(1, LONG_PROMPT_TOKENS)
    with running_pod(tmp_path, *settings(values), dp_groups=2, expert_workers=1) as pod:
        ((long,), *shorts) = await asyncio.gather(
            stream(pod, [prompt], LONG_OUTPUT_TOKENS),
            *(stream(pod, [draw(50 + i, 100)], 200) for i in range(4)),
        )
        assert (
            long.error is None
            and len(long.token_ids) == LONG_OUTPUT_TOKENS
            and long.finish_reason == "length"
        )
        for i, (answer,) in enumerate(shorts):
            assert answer.token_ids == expected_tokens(tmp_path, draw(50 + i, 100), 200)
    assert long.token_ids[:4] == expected_tokens(tmp_path, prompt, 4)
