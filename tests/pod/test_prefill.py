"""Prefill in processes of its own: the oracle's tokens and bits, KV that was really moved, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from services.model.sampling import token_logprob
from tests.conftest import GOLDENS
from tests.harness.client import Stream, stream_completion
from tests.harness.oracle import expected_tokens, oracle
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import async_eventually, eventually

FAMILIES = ("qwen3_moe", "deepseek_v3")  # grouped-query and latent attention
BLOCK = 16
TOKENS_MIN = 24
MAX_TOKENS = 10

Case = tuple[str, bool, bool, bool]  # family, disaggregated, prefix cache, chunked prefill
ALL_CASES: list[Case] = [
    (family, disaggregated, caches, chunked)
    for family in FAMILIES
    for disaggregated in (True, False)
    for caches in (True, False)
    for chunked in (True, False)
]
QUICK_CASES = [case for case in ALL_CASES if case[1] and case[2] == case[3]]


def case_id(case: Case) -> str:
    family, disaggregated, caches, chunked = case
    names = ("disaggregated" if disaggregated else "colocated", "cache" if caches else "nocache")
    return "-".join((family, *names, "chunked" if chunked else "whole"))


def flags(case: Case) -> list[str]:
    _, disaggregated, caches, chunked = case
    tokens = 48 if chunked else 1024
    values = {
        "topology.prefill_workers": int(disaggregated),
        "scheduler.enable_prefix_caching": str(caches).lower(),
        "scheduler.max_num_batched_tokens": tokens,
        "prefill.max_num_batched_tokens": tokens,
        "prefill.tokens_min": TOKENS_MIN,
    }
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def draw(seed: int, count: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(3, 200, count).tolist()
    return drawn


def totals(pod: Pod, service: str) -> dict[str, int]:
    """Return the sums of a service's counters over its members."""
    sums: dict[str, int] = {}
    for member in pod.status()["members"]:
        for name, count in member["counters"].items() if member["service"] == service else ():
            sums[name] = sums.get(name, 0) + count
    return sums


async def stream(pod: Pod, prompts: list[list[int]], **fields: Any) -> list[Stream]:
    async with httpx.AsyncClient(base_url=pod.url, timeout=120) as client:
        body = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "logprobs": 0, **fields}
        return await asyncio.gather(*(stream_completion(client, prompt, **body) for prompt in prompts))


def assert_oracles(family: str, prompts: list[list[int]], streams: list[Stream]) -> None:
    folder = GOLDENS / family
    for prompt, answer in zip(prompts, streams, strict=True):
        output = answer.token_ids
        assert answer.error is None and output == expected_tokens(folder, prompt, MAX_TOKENS)
        logits = oracle(folder).logits([*prompt, *output])[len(prompt) - 1 :]
        assert answer.logprobs == [
            token_logprob(logits[i], token, 0).logprob for i, token in enumerate(output)
        ]


def marked(case: Case) -> Any:
    return pytest.param(case, marks=() if case in QUICK_CASES else pytest.mark.slow, id=case_id(case))


@pytest.mark.parametrize("case", [marked(case) for case in ALL_CASES])
async def test_tokens_and_bits_alone_and_mixed_and_kv_really_moves(case: Case) -> None:
    family, disaggregated, caches, _ = case
    shared = draw(1, 150)
    prompts = [[*shared[: 17 * i], *draw(100 + i, 3 + 2 * i)] for i in range(9)]
    with running_pod(GOLDENS / family, *flags(case), dp_groups=2, expert_workers=2) as pod:
        for prompt in (prompts[0], prompts[-1]):
            assert_oracles(family, [prompt], await stream(pod, [prompt]))
        assert_oracles(family, prompts, await stream(pod, prompts))
        if disaggregated:
            await asyncio.to_thread(assert_kv_moved, pod, prompts, caches=caches)


def assert_kv_moved(pod: Pod, prompts: list[list[int]], *, caches: bool) -> None:
    """Compare what both sides have counted where the bytes were read and written."""
    eventually(lambda: totals(pod, "scheduler").get("num_running") == 0, timeout_s=10)
    eventually(
        lambda: totals(pod, "attention")["kv_blocks_fetched"] == totals(pod, "prefill")["kv_blocks_sent"],
        timeout_s=10,
        what="both sides counted the same blocks",
    )
    attention, prefill = totals(pod, "attention"), totals(pod, "prefill")
    assert attention["kv_bytes_fetched"] == prefill["kv_bytes_sent"] > 0
    long = [prompt for prompt in [prompts[-1], *prompts] if len(prompt) >= TOKENS_MIN]
    if not caches:
        assert attention["kv_blocks_fetched"] == sum(-(-len(prompt) // BLOCK) for prompt in long)
        assert prefill["computed_tokens"] == sum(map(len, long))
        short = [prompt for prompt in [prompts[0], *prompts] if len(prompt) < TOKENS_MIN]
        decoded = (len(long) + len(short)) * (MAX_TOKENS - 1)
        assert attention["computed_tokens"] == sum(map(len, short)) + decoded
    members = [m for m in pod.status()["members"] if m["service"] in ("attention", "prefill")]
    assert len({m["pid"] for m in members}) == len(members) == 3


@pytest.fixture(scope="module")
def slow_pod() -> Iterator[Pod]:
    """Small steps and few blocks, so that a prompt is under way for long and transfers wait for blocks."""
    overrides = {
        "topology.prefill_workers": 1,
        "prefill.tokens_min": TOKENS_MIN,
        "prefill.max_num_batched_tokens": 32,
        "kv.cache_tokens": 512,
        "prefill.cache_tokens": 2048,
        "scheduler.max_num_batched_tokens": 64,
        "scheduler.max_num_seqs": 32,
    }
    parts = [part for name, value in overrides.items() for part in ("--set", f"{name}={value}")]
    with running_pod(GOLDENS / "deepseek_v3", *parts, dp_groups=1, expert_workers=2) as pod:
        yield pod


def assert_all_free(pod: Pod) -> None:
    """Every block of the decode group and of the prefill worker is free, and nobody is on the way."""

    def free() -> bool:
        scheduler, shell = totals(pod, "scheduler"), totals(pod, "shell")
        return (
            scheduler["num_free_blocks"] == scheduler["num_blocks"]
            and shell["num_free_blocks"] == shell["num_blocks"]
            and scheduler["num_running"] == scheduler["num_waiting"] == scheduler["num_transferring"] == 0
        )

    eventually(free, timeout_s=10, what="everything freed", interval_s=0.05)


async def test_thirty_two_requests_with_kv_for_a_few_all_finish(slow_pod: Pod) -> None:
    prompts = [
        draw(500 + i, 40 + i) for i in range(32)
    ]  # of about 60 tokens in the end; the cache holds 8 of them
    assert_oracles("deepseek_v3", prompts, await stream(slow_pod, prompts))
    await asyncio.to_thread(assert_all_free, slow_pod)
    assert totals(slow_pod, "scheduler")["num_kv_fetches"] > 0


@pytest.mark.parametrize("leave_after_s", [0.0, 0.02, 0.05, 0.1, 0.3])
async def test_whoever_leaves_frees_everything(slow_pod: Pod, leave_after_s: float) -> None:
    """In mid-prefill, waiting, in mid-transfer or in mid-decode: wherever the moment falls."""
    prompts = [draw(900 + i + int(1000 * leave_after_s), 150) for i in range(8)]
    async with httpx.AsyncClient(base_url=slow_pod.url, timeout=60) as client:
        tasks = [
            asyncio.create_task(stream_completion(client, prompt, max_tokens=300, ignore_eos=True))
            for prompt in prompts
        ]
        await async_eventually(
            lambda: totals(slow_pod, "scheduler")["num_accepted_requests"] > 0, timeout_s=10, interval_s=0.005
        )
        await asyncio.sleep(leave_after_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(assert_all_free, slow_pod)
