"""The measurement of trampolines on a small pod of real processes."""

from __future__ import annotations

from typing import Any

from bus.bench.trampoline import Load, run
from bus.memory.shm import SHM_DIR
from bus.xccl.cost import Route


def test_the_grid_is_measured_and_one_way_is_picked_per_case() -> None:
    before = set(SHM_DIR.glob("xds-bench*"))
    rows: list[dict[str, Any]] = []
    loads = (Load(2, 8), Load(3, 16))
    rule = run(
        rows.append,
        attention_ranks=4,
        expert_ranks=6,
        processes=2,
        targets=(1, 6),
        loads=loads,
        rounds=1,
        repeats=2,
    )
    assert [(row["way"], row["targets"], row["num_bytes"]) for row in rows] == [
        (route.value, targets, load.num_bytes) for load in loads for targets in (1, 6) for route in Route
    ]
    for direct, trampoline in zip(rows[::2], rows[1::2], strict=True):
        assert direct["a2e_cell_writes_per_rank"] == direct["targets"]
        assert trampoline["a2e_cell_writes_per_rank"] == 1
        picked = rule.choose(direct["targets"], direct["num_bytes"])
        assert [row["way"] for row in (direct, trampoline) if row["picked"]] == [picked.value]
        assert all(0 < row["p50_us"] <= row["p99_us"] for row in (direct, trampoline))
    assert set(SHM_DIR.glob("xds-bench*")) == before
