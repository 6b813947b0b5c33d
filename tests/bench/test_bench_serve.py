"""`xds bench serve` with real pods: two ways in turns, a trace with shared prefixes, nothing left."""

from __future__ import annotations

import json
from pathlib import Path

from services.cli import main

SMALL = ("--set", "topology.dp_groups=1", "--set", "topology.expert_workers=1")


def test_a_trace_on_two_pods_finds_the_prefixes_that_an_infinite_cache_would(tmp_path: Path) -> None:
    rows = [{"timestamp": 150 * i, "input_length": 2048, "output_length": 64} for i in range(12)]
    for i, row in enumerate(rows):
        row["hash_ids"] = [1, 2, 3, i // 3 + 10]  # type: ignore[assignment]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tmp_path / "found.json"
    flags = ("--trace", "mooncake", str(trace), "--scale", "0.125", "--compare", "cache-on", "cache-off")
    assert main(["bench", "serve", *SMALL, *flags, "--json", str(found), "--rounds", "2"]) == 0
    with_cache, without = json.loads(found.read_text())["loads"]
    for one in (with_cache, without):
        assert (one["num_requests"], one["num_failed"]) == (24, 0)
        assert one["prompt_tokens"] == 24 * 256
        assert one["ideal_hit_rate"] > 0.5
        assert one["cpu_s"] > 0
    assert without["hit_rate"] == 0
    assert with_cache["hit_rate"] == with_cache["ideal_hit_rate"]
    assert not [path.name for path in Path("/dev/shm").glob("xds-bench-*")]


def test_the_long_prompt_is_computed_beside_short_requests(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    flags = ("--scenario", "long-prompt", "--long-prompt-tokens", "2048", "--compare", "colocated")
    assert main(["bench", "serve", *SMALL, *flags, "--json", str(found)]) == 0
    [pod] = json.loads(found.read_text())["pods"]
    assert pod["variant"] == "colocated"
    assert pod["errors"] == []
    assert pod["ratio"]["p50"] > 0
    assert pod["long_ttft_s"] > 0
