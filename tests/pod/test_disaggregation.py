"""Right tokens do not prove disaggregation: the work is counted where it happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from services.model.config import load_config
from tests.conftest import GOLDENS
from tests.harness.client import stream_completion
from tests.harness.pod import Pod
from tests.harness.poll import eventually


def members(pod: Pod, service: str) -> list[dict[str, Any]]:
    return [m for m in pod.status()["members"] if m["service"] == service]


def total(pod: Pod, service: str, counter: str) -> int:
    return sum(m["counters"].get(counter, 0) for m in members(pod, service))


async def test_expert_rows_are_counted_in_the_expert_processes_and_add_up(deepseek_pod: Pod) -> None:
    pod, config = deepseek_pod, load_config(GOLDENS / "deepseek_v3")
    eventually(lambda: total(pod, "scheduler", "num_running") == 0, timeout_s=10)
    before = {c: total(pod, "expert", c) for c in ("expert_rows", "shared_rows")}
    tokens_before = total(pod, "attention", "computed_tokens")
    async with httpx.AsyncClient(base_url=pod.url, timeout=60) as client:
        for length in (5, 17, 30):
            # Nobody else sends these, so that nothing of them is cached.
            prompt = np.random.default_rng(2_000 + length).integers(3, 200, length).tolist()
            await stream_completion(client, prompt, max_tokens=9, ignore_eos=True)
    computed = 5 + 17 + 30 + 3 * 8  # the last token of a request is sampled, never computed

    def settled() -> bool:
        return total(pod, "attention", "computed_tokens") - tokens_before == computed

    eventually(settled, timeout_s=5, what=f"{computed} computed tokens in the heartbeats")
    rows = computed * config.top_k * config.num_moe_layers
    eventually(
        lambda: total(pod, "expert", "expert_rows") - before["expert_rows"] == rows,
        timeout_s=5,
        what=f"{rows} expert rows",
    )
    assert total(pod, "expert", "shared_rows") - before["shared_rows"] == computed * config.num_moe_layers


def test_every_role_is_a_process_of_its_own(deepseek_pod: Pod) -> None:
    found = deepseek_pod.status()["members"]
    pids = [m["pid"] for m in found]
    assert len(set(pids)) == len(pids) == 1 + 1 + 2 + 2 + 4
    for member in found:
        command = Path(f"/proc/{member['pid']}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        module = (
            "gateway.process" if member["service"] == "gateway" else f"services.{member['service']}.process"
        )
        assert f"{module} --index {member['index']}" in command


def test_attention_workers_map_no_expert_weights(deepseek_pod: Pod) -> None:
    attention, experts = members(deepseek_pod, "attention"), members(deepseek_pod, "expert")
    assert all(m["counters"]["held_expert_tensors"] == 0 for m in attention)
    assert all(m["counters"]["held_expert_tensors"] > 0 for m in experts)
    header_bytes = read_tensor_bytes(GOLDENS / "deepseek_v3")
    held = attention[0]["counters"]["held_weight_bytes"]
    assert held == header_bytes["other"]


def read_tensor_bytes(folder: Path) -> dict[str, int]:
    """Bytes of routed and shared expert tensors, and of all others, read from the checkpoint's own headers."""
    sums = {"expert": 0, "other": 0}
    for shard in folder.glob("*.safetensors"):
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sums["expert" if "experts." in name else "other"] += end - begin
    return sums


def test_status_has_the_published_shape(deepseek_pod: Pod) -> None:
    status = deepseek_pod.status()
    assert status["pod"] == deepseek_pod.name
    assert status["healthy"] is True
    for member in status["members"]:
        assert {"service", "index", "pid", "incarnation", "state"} <= member.keys()
        assert member["state"] == "ready"
