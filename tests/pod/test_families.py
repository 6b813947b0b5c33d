"""Pods of families that differ in storage: bf16 with a layer that is left out, FP8 under other names, dense.

`make parity` serves every variant of every family in many topologies; here are the three that load and place weights
in ways of their own.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.model.config import load_config
from tests.conftest import GOLDENS
from tests.harness.client import stream_completion
from tests.harness.pod import Pod, running_pod
from tests.harness.poll import eventually
from tests.pod.test_weights import page_set, pids, tensors_of, weight_mappings

OF_EXPERTS = {
    "glm4_moe": re.compile(r"\.(shared_)?experts\."),
    "minimax_m2_fp8": re.compile(r"\.block_sparse_moe\.experts\."),
    "qwen3": re.compile(r"\.mlp\."),
}
NOT_SERVED = re.compile(
    r"model\.layers\.3\."
)  # glm4_moe has three layers; the fourth is for multi-token prediction


@dataclass
class Served:
    """A golden and a pod of it that has answered all its prompts at once."""

    folder: Path
    pod: Pod
    expected: dict[str, Any]
    answers: list[list[int]]


@pytest.fixture(scope="module", params=OF_EXPERTS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    folder = GOLDENS / request.param
    expected = json.loads((folder / "expected.json").read_text())
    # Nothing is taken over from another prompt, so that all of it is computed and can be counted.
    off = ("--set", "scheduler.enable_prefix_caching=false")
    with running_pod(folder, *off, dp_groups=1, expert_workers=3) as pod:
        answers = asyncio.run(ask_all(pod, expected["prompts"], expected["max_tokens"]))
        yield Served(folder, pod, expected, answers)


async def ask_all(pod: Pod, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        asked = (stream_completion(client, p, max_tokens=max_tokens, ignore_eos=True) for p in prompts)
        return [stream.token_ids for stream in await asyncio.gather(*asked)]


def test_tokens_are_those_of_transformers(served: Served) -> None:
    assert served.answers == served.expected["greedy"]


def test_experts_work_where_experts_are(served: Served) -> None:
    config = load_config(served.folder)

    def total(service: str, counter: str) -> int:
        members = [m for m in served.pod.status()["members"] if m["service"] == service]
        return sum(int(m["counters"].get(counter, 0)) for m in members)

    computed = sum(len(p) for p in served.expected["prompts"]) + sum(len(a) - 1 for a in served.answers)
    eventually(lambda: total("attention", "computed_tokens") == computed, timeout_s=5, what="all computed")
    rows = computed * config.num_moe_layers
    eventually(lambda: total("expert", "expert_rows") == rows * config.top_k, timeout_s=5, what="expert rows")
    shared = rows * int(config.has_shared_expert)
    eventually(lambda: total("expert", "shared_rows") == shared, timeout_s=5, what="shared expert's rows")


def test_attention_workers_map_no_page_of_experts_alone(served: Served) -> None:
    tensors = tensors_of(served.folder)
    of_experts = OF_EXPERTS[served.folder.name]
    others = {
        name: t for name, t in tensors.items() if not of_experts.search(name) and not NOT_SERVED.match(name)
    }
    wanted = page_set(others.values())
    (pid,) = pids(served.pod, "attention")
    assert page_set(weight_mappings(pid)) == wanted
    experts = page_set(t for name, t in tensors.items() if of_experts.search(name))
    assert any(pages - wanted.get(path, set()) for path, pages in experts.items())
    for pid in pids(served.pod, "expert"):
        mapped = page_set(weight_mappings(pid))
        assert mapped
        assert all(pages <= experts.get(path, set()) for path, pages in mapped.items())
