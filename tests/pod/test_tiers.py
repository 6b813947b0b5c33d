"""Tiers of the KV cache in a pod: blocks from the host file and copied blocks have the oracle's bits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from services.model.sampling import token_logprob
from tests.conftest import GOLDENS
from tests.harness.client import Stream, stream_completion
from tests.harness.oracle import expected_tokens, oracle
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import eventually

CASES = [("qwen3_moe", "auto"), ("deepseek_v3", "int8")]
SMALL = ("--set", "kv.cache_tokens=128", "--set", "kv.host_tokens=2048")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def served(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Pod, str]]:
    name, dtype = request.param
    overrides = (*SMALL, "--set", f"attention.kv_cache_dtype={dtype}")
    with running_pod(GOLDENS / name, *overrides, dp_groups=1, expert_workers=2) as pod:
        yield GOLDENS / name, pod, dtype


def draw(seed: int, count: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(3, 200, count).tolist()
    return drawn


async def stream(pod: Pod, *prompts: list[int], max_tokens: int = 6) -> list[Stream]:
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        asked = (
            stream_completion(client, prompt, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
            for prompt in prompts
        )
        return await asyncio.gather(*asked)


def counter(pod: Pod, name: str, service: str) -> int:
    return int(pod.member(service, 0)["counters"][name])


def external_hits(pod: Pod) -> float:
    text = httpx.get(f"{pod.url}/metrics", timeout=10).text
    (line,) = [one for one in text.splitlines() if one.startswith("vllm:external_prefix_cache_hits_total{")]
    return float(line.rsplit(" ", 1)[1])


async def test_blocks_that_come_back_have_the_bits_that_went(served: tuple[Path, Pod, str]) -> None:
    folder, pod, dtype = served
    prompts = [draw(seed, 70) for seed in range(4)]  # of which the cache holds one
    cold = [(await stream(pod, prompt))[0] for prompt in prompts]
    warm = [(await stream(pod, prompt))[0] for prompt in prompts]
    for prompt, before, after in zip(prompts, cold, warm, strict=True):
        assert before.error is None and (after.token_ids, after.logprobs) == (
            before.token_ids,
            before.logprobs,
        )
        if dtype == "auto":
            assert after.token_ids == expected_tokens(folder, prompt, len(after.token_ids))
    eventually(
        lambda: counter(pod, "loaded_blocks", "attention") >= 8, timeout_s=10, what="loads are counted"
    )
    assert counter(pod, "stored_blocks", "attention") >= 8
    eventually(lambda: external_hits(pod) >= 8 * 16, timeout_s=10, what="the scheduler's hits in /metrics")


async def test_choices_of_one_prompt_copy_its_last_block(served: tuple[Path, Pod, str]) -> None:
    folder, pod, dtype = served
    prompt = draw(9, 27)
    body = {"prompt": prompt, "n": 3, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
    logprobs = [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]]
    assert len(logprobs) == 3 and logprobs[0] == logprobs[1] == logprobs[2]
    eventually(
        lambda: counter(pod, "copied_blocks", "attention") >= 2, timeout_s=10, what="copies are counted"
    )
    if dtype == "auto":
        output = expected_tokens(folder, prompt, 5)
        logits = oracle(folder).logits([*prompt, *output])[len(prompt) - 1 :]
        assert logprobs[0] == [token_logprob(logits[i], t, 0).logprob for i, t in enumerate(output)]


def test_the_file_is_open_and_has_no_name(served: tuple[Path, Pod, str]) -> None:
    _, pod, _ = served
    links = Path(f"/proc/{pod.member('attention', 0)['pid']}/fd").iterdir()
    names = [str(link.readlink()) for link in links]
    assert any(name.endswith("attention-0.kv (deleted)") for name in names)
