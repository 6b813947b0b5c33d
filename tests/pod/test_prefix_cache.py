"""With the prefix cache or without, a pod answers the oracle's tokens and bits; usage and metrics tell of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import GOLDENS
from tests.harness.client import Stream, stream_completion
from tests.harness.oracle import expected_tokens, oracle
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import eventually

BLOCK = 16
CASES = [
    ("qwen3_moe", "true"),
    ("qwen3_moe", "false"),
    ("deepseek_v3", "true"),
    ("deepseek_v3", "false"),
]


class Served:
    """A pod of one DP group, so that every request meets the same cache."""

    def __init__(self, folder: Path, pod: Pod, *, caches: bool) -> None:
        self.folder, self.pod, self.caches = folder, pod, caches
        self.num_requests = 0

    def expected_hit(self, num_tokens: int) -> int:
        return num_tokens // BLOCK * BLOCK if self.caches else 0

    def complete(self, prompt: list[int], **fields: object) -> dict[str, object]:
        self.num_requests += int(str(fields.get("n", 1)))
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}
        response = httpx.post(f"{self.pod.url}/v1/completions", json=body, timeout=60)
        response.raise_for_status()
        answer: dict[str, object] = response.json()
        return answer

    def cached_tokens(self, prompt: list[int], **fields: object) -> int:
        usage = self.complete(prompt, **fields)["usage"]
        assert isinstance(usage, dict)
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    async def stream(self, prompts: list[list[int]], max_tokens: int = 12) -> list[Stream]:
        self.num_requests += len(prompts)
        async with httpx.AsyncClient(base_url=self.pod.url, timeout=60) as client:
            asked = (
                stream_completion(client, p, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
                for p in prompts
            )
            return await asyncio.gather(*asked)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    name, enabled = request.param
    overrides = ("--set", f"scheduler.enable_prefix_caching={enabled}")
    with running_pod(GOLDENS / name, *overrides, dp_groups=1, expert_workers=2) as pod:
        yield Served(GOLDENS / name, pod, caches=enabled == "true")


def draw(seed: int, count: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(3, 200, count).tolist()
    return drawn


def assert_oracles(served: Served, prompts: list[list[int]], streams: list[Stream]) -> None:
    from services.model.sampling import token_logprob

    for prompt, stream in zip(prompts, streams, strict=True):
        output = stream.token_ids
        assert stream.error is None and output == expected_tokens(served.folder, prompt, len(output))
        logits = oracle(served.folder).logits([*prompt, *output])[len(prompt) - 1 :]
        bits = [token_logprob(logits[i], token, 0).logprob for i, token in enumerate(output)]
        assert stream.logprobs == bits


async def test_hits_have_the_oracles_bits_alone_and_in_a_batch(served: Served) -> None:
    shared = draw(1, 50)
    prompts = [[*shared[: 10 + 5 * i], *draw(100 + i, 1 + i)] for i in range(8)]
    for _ in range(2):
        assert_oracles(served, prompts, await served.stream(prompts))
    assert_oracles(served, prompts[-1:], await served.stream(prompts[-1:]))


def test_usage_tells_what_was_cached(served: Served) -> None:
    prompt = draw(2, 3 * BLOCK)
    assert served.cached_tokens(prompt) == 0
    assert served.cached_tokens(prompt) == served.expected_hit(len(prompt) - 1)
    assert served.cached_tokens([*prompt[:20], *draw(3, 9)]) == served.expected_hit(20)
    assert served.cached_tokens(prompt, n=3, temperature=1) == served.expected_hit(len(prompt) - 1)
    assert served.cached_tokens(prompt, prompt_logprobs=0) == 0


def test_prompt_log_probabilities_are_the_same_with_a_warm_cache(served: Served) -> None:
    prompt = draw(4, 2 * BLOCK + 5)
    fields = {"prompt_logprobs": 1, "max_tokens": 2}
    cold, warm = (served.complete(prompt, **fields)["choices"] for _ in range(2))
    assert cold == warm


def test_metrics_count_queries_and_hits_in_tokens(served: Served) -> None:
    def read(name: str) -> float:
        text = httpx.get(f"{served.pod.url}/metrics", timeout=10).text
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
        return float(line.rsplit(" ", 1)[1])

    def counters() -> tuple[float, float]:
        return read("vllm:prefix_cache_queries_total"), read("vllm:prefix_cache_hits_total")

    def settled() -> bool:
        return read("xds:num_finished_requests") == served.num_requests

    eventually(settled, timeout_s=10, what="earlier requests in the heartbeat")
    before = counters()
    prompt = draw(5, 2 * BLOCK + 2)
    served.cached_tokens(prompt)
    served.cached_tokens(prompt)

    eventually(settled, timeout_s=10, what="both requests in the heartbeat")
    grown = tuple(after - earlier for after, earlier in zip(counters(), before, strict=True))
    assert grown == ((2.0 * len(prompt), 2.0 * BLOCK) if served.caches else (0.0, 0.0))


async def test_a_killed_attention_worker_takes_its_cache_along(served: Served) -> None:
    prompt = draw(6, 4 * BLOCK)
    served.cached_tokens(prompt)
    incarnation = served.pod.incarnation("attention", 0)
    served.pod.xds("kill", "attention/0")
    eventually(lambda: served.pod.incarnation("attention", 0) > incarnation, timeout_s=30)
    assert served.cached_tokens(prompt) == 0, "it is computed again"
    assert_oracles(served, [prompt] * 3, await served.stream([prompt] * 3))
