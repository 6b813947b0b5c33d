"""Whatever the batch and the placement, a pod answers with the oracle's tokens and the oracle's bits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import GOLDENS
from tests.harness.client import Stream, stream_completion
from tests.harness.oracle import expected_tokens, oracle
from tests.harness.pod import Pod
from tests.harness.sampling_cases import CASES, Case

FAMILIES = ["qwen3_moe", "deepseek_v3"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Path, Pod]:
    name = request.param
    return GOLDENS / name, request.getfixturevalue(f"{name.split('_')[0].removesuffix('3')}_pod")


def prompts(count: int, vocab_size: int = 200) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, vocab_size, int(rng.integers(1, 40))).tolist() for _ in range(count)]


async def run_all(pod: Pod, given: list[list[int]], **fields: object) -> list[Stream]:
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        return await asyncio.gather(*(stream_completion(client, p, **fields) for p in given))  # type: ignore[arg-type]


async def test_thirty_two_at_once_equal_the_oracle(family: tuple[Path, Pod]) -> None:
    folder, pod = family
    given = prompts(32)
    streams = await run_all(pod, given, max_tokens=24, ignore_eos=True)
    assert [s.token_ids for s in streams] == [expected_tokens(folder, p, 24) for p in given]
    assert all(s.done and s.finish_reason == "length" and s.error is None for s in streams)


async def test_log_probabilities_have_the_oracles_bits_alone_and_in_a_batch(family: tuple[Path, Pod]) -> None:
    folder, pod = family
    given = prompts(8)
    together = await run_all(pod, given, max_tokens=6, ignore_eos=True, logprobs=0)
    for prompt, stream in zip(given, together, strict=True):
        (alone,) = await run_all(pod, [prompt], max_tokens=6, ignore_eos=True, logprobs=0)
        assert alone.token_ids == stream.token_ids
        assert alone.logprobs == stream.logprobs == oracle_logprobs(folder, prompt, stream.token_ids)


def oracle_logprobs(folder: Path, prompt: list[int], output: list[int]) -> list[float]:
    from services.model.sampling import token_logprob

    logits = oracle(folder).logits([*prompt, *output])
    first = len(prompt) - 1
    return [token_logprob(logits[first + i], token, 0).logprob for i, token in enumerate(output)]


async def test_sampling_depends_on_the_seed_alone(family: tuple[Path, Pod]) -> None:
    folder, pod = family
    given = prompts(6)
    fields = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 11}
    streams = await run_all(pod, given, max_tokens=16, ignore_eos=True, **fields)
    assert [s.token_ids for s in streams] == [expected_tokens(folder, p, 16, **fields) for p in given]
    other = await run_all(pod, given[:1], max_tokens=16, ignore_eos=True, **{**fields, "seed": 12})
    assert other[0].token_ids != streams[0].token_ids


async def test_every_parameter_alone_and_in_a_batch_of_32(family: tuple[Path, Pod]) -> None:
    """Penalties, bias, min-p and grammars: what a request draws is its own affair."""
    folder, pod = family
    given = [(prompt, CASES[i % len(CASES)], 50 + i) for i, prompt in enumerate(prompts(32))]
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:

        async def one(prompt: list[int], case: Case, seed: int) -> list[int]:
            stream = await stream_completion(
                client, prompt, max_tokens=20, ignore_eos=True, seed=seed, **case.http
            )
            assert stream.error is None and stream.done, (case.name, stream.error)
            return stream.token_ids

        together = await asyncio.gather(*(one(*args) for args in given))
        alone = [await one(*args) for args in given[: len(CASES)]]
    expected = [expected_tokens(folder, p, 20, seed=seed, **case.oracle) for p, case, seed in given]
    for (_, case, _), got, wanted in zip(given, together, expected, strict=True):
        assert got == wanted, case.name
    assert alone == expected[: len(CASES)]


async def test_a_prompt_longer_than_a_step_is_chunked_and_equal(family: tuple[Path, Pod]) -> None:
    folder, pod = family
    rng = np.random.default_rng(3)
    given = [rng.integers(3, 200, 300).tolist(), *prompts(3)]
    streams = await run_all(pod, given, max_tokens=8, ignore_eos=True)
    assert [s.token_ids for s in streams] == [expected_tokens(folder, p, 8) for p in given]
