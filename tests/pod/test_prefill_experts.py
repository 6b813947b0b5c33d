"""Prefill workers that share the experts: the oracle's tokens and bits, and rows that really travelled."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import GOLDENS
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import eventually
from tests.pod.test_prefill import FAMILIES, assert_oracles, draw, stream

NUM_TOKENS = [30 + 9 * i for i in range(7)]


@pytest.mark.parametrize("family", FAMILIES)
async def test_tokens_and_bits_alone_and_mixed(family: str) -> None:
    values = {
        "topology.prefill_workers": 2,
        "prefill.expert_parallel": "true",
        "prefill.tokens_min": 24,
        "prefill.max_num_batched_tokens": 48,
        "scheduler.enable_prefix_caching": "false",
    }
    flags = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    prompts = [draw(700 + i, count) for i, count in enumerate(NUM_TOKENS)]
    with running_pod(GOLDENS / family, *flags, dp_groups=1, expert_workers=2) as pod:
        assert_oracles(family, prompts[:1], await stream(pod, prompts[:1]))
        assert_oracles(family, prompts, await stream(pod, prompts))
        await asyncio.to_thread(assert_shared, pod, sum(NUM_TOKENS) + NUM_TOKENS[0])


def assert_shared(pod: Pod, num_tokens: int) -> None:
    """Both workers computed prompts, stepped together, and did experts' work for one another."""

    def workers() -> list[dict[str, int]]:
        return [member["counters"] for member in pod.status()["members"] if member["service"] == "prefill"]

    def is_told() -> bool:
        first, second = workers()
        told = first["computed_tokens"] + second["computed_tokens"]
        return told == num_tokens and first["exchanges"] == second["exchanges"]

    eventually(is_told, timeout_s=10, what="the same steps on both, with all tokens", interval_s=0.2)
    for worker in workers():
        assert worker["expert_rows"] > 0 and worker["computed_tokens"] > 0 and worker["exchanges"] > 0
