"""INT8 weights, an INT8 cache and INT8 on the wire: a pod's tokens are those of an oracle that rounds the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from services.model import KvSpec, ReferenceModel, load_config
from services.quantize.layer import Recipe
from services.quantize.quantizer import quantize
from tests.chaos.test_kill import kill_in_mid_stream
from tests.conftest import GOLDENS
from tests.harness.client import stream_completion
from tests.harness.oracle import expected_tokens, oracle
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import eventually

FOLDER = GOLDENS / "deepseek_v3"
KV = ["--set", "attention.kv_cache_dtype=int8"]
WIRE = ["--set", "xccl.int8=true"]
TRAMPOLINES = ["--set", "xccl.route_costs_ns=1,1,1,0,0,0"]
PROMPTS = [[(11 * i + 5 * j) % 190 + 5 for j in range(1 + 3 * i)] for i in range(16)]


@dataclass
class Served:
    """A pod and the oracle that runs in the same form."""

    pod: Pod
    model: ReferenceModel


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("int8") / "deepseek_v3"
    token_ids = np.random.default_rng(3).integers(0, load_config(FOLDER).vocab_size, (6, 40))
    quantize(FOLDER, target, token_ids, Recipe(), lambda *_: None)
    return target


@pytest.fixture(scope="module")
def all_int8(quantized: Path) -> Iterator[Served]:
    with running_pod(quantized, *KV, *WIRE) as pod:
        yield Served(pod, oracle(quantized, "int8", True))


async def check_tokens(pod: Pod, model: ReferenceModel) -> None:
    """Compare all prompts at once and some alone."""
    expected = [expected_tokens(model, prompt, 16) for prompt in PROMPTS]
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        asked = [stream_completion(client, p, max_tokens=16, ignore_eos=True) for p in PROMPTS]
        assert [stream.token_ids for stream in await asyncio.gather(*asked)] == expected
        for prompt, tokens in list(zip(PROMPTS, expected, strict=True))[:3]:
            alone = await stream_completion(client, prompt, max_tokens=16, ignore_eos=True)
            assert alone.token_ids == tokens


async def test_tokens_with_int8_everywhere(all_int8: Served) -> None:
    await check_tokens(all_int8.pod, all_int8.model)
    plain = oracle(Path(all_int8.model.folder))
    assert any(expected_tokens(plain, p, 16) != expected_tokens(all_int8.model, p, 16) for p in PROMPTS)


@pytest.mark.parametrize("service", ["expert", "attention"])
async def test_streams_survive_a_kill(all_int8: Served, service: str) -> None:
    await kill_in_mid_stream(all_int8.pod, service, 0, model=all_int8.model)


async def test_an_int8_cache_alone_takes_its_bytes(tmp_path: Path) -> None:
    with running_pod(FOLDER, *KV, "--set", "kv.cache_tokens=4096", dp_groups=1, expert_workers=2) as pod:
        await check_tokens(pod, oracle(FOLDER, "int8"))
        wanted = 4096 * KvSpec.of(load_config(FOLDER), "int8").bytes_per_token
        eventually(
            lambda: pod.member("attention", 0)["counters"].get("kv_cache_bytes") == wanted, timeout_s=5
        )


@pytest.mark.parametrize("route", [[], TRAMPOLINES], ids=["direct", "trampolines"])
async def test_int8_on_the_wire_alone(route: list[str]) -> None:
    with running_pod(FOLDER, *WIRE, *route, dp_groups=2, expert_workers=3) as pod:
        await check_tokens(pod, oracle(FOLDER, wire_int8=True))
