from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bus.bench import machine, plot
from bus.bench.launch import WAYS, Way, launch
from bus.bench.plan import Plan
from bus.bench.report import Report, write_json
from bus.bench.session import Absence, Record
from bus.bench.stats import figures
from bus.bench.tables import render, size_name
from bus.errors import ConfigError

ONE, IDLE = {"scenario": "one pair", "size": 64}, {"scenario": "sleeping waiter"}
MOE = {"ranks": 4, "form": "A2E + E2A", "batch": 1, "hidden": 256, "top_k": 4, "kind": "int8"}

UNEVEN = {"unevenness": 3.0, "bare_unevenness": 1.5}


def report() -> Report:
    fast, slow = figures([[500, 1_500]]), figures([[2_000_000]])
    records = [
        Record("p2p", "C limit", dict(ONE), fast, {"mb_per_s": 64.0, "to_limit": 1.0}),
        Record("p2p", "ours adaptive", dict(ONE), fast, {"mb_per_s": 64.0, "to_limit": 2.25, "to_ours": 1.0}),
        Record("p2p", "pyzmq", {**ONE, "size": 1 << 20}, slow, {"mb_per_s": 524.3, "to_ours": 4.5}),
        Record("p2p", "pyzmq", dict(IDLE), slow, {"cpu_percent": 0.05}),
        Record("crowd", "pyzmq", {"scenario": "4 pairs", "size": 64}, slow, {"mb_per_s": 1.0}),
        Record("all-to-all", "MPICH", {"ranks": 4, "size": 4096}, slow, {"mean_to_ours": 2.5}),
        Record("moe", "ours", dict(MOE), fast, {"to_ours": 1.0, **UNEVEN}),
        Record("moe", "MPICH", dict(MOE), slow, {"to_ours": 3.0}),
        Record("moe", "MPICH", {**MOE, "batch": 8}, slow, {"to_ours": 5.0}),
    ]
    absences = [
        Absence("p2p", "openmpi", False, "mpi4py is not installed"),
        Absence("moe", "gloo", True, "died"),
    ]
    trampoline = {
        "way": "direct",
        "targets": 8,
        "num_bytes": 4096,
        "p50_us": 5.0,
        "p99_us": 6.0,
        "send_p50_us": 1.0,
    }
    common = {"pick_to_winner": 1.25, "route_costs_ns": "1,2,3,4,5,6"}
    trampolines = [
        {**trampoline, **common, "a2e_cell_writes_per_rank": 8.0, "picked": True},
        {**trampoline, **common, "way": "trampoline", "a2e_cell_writes_per_rank": 1.0, "picked": False}
        | {"p50_us": 4.0},
    ]
    return Report(machine.facts(), Plan(), 12.0, absences, records, trampolines)


def lines_with(text: str, words: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(words)]


def test_tables_show_every_figure_and_why_one_is_missing() -> None:
    text = render(report())
    assert "one pair, one way, us: p50 / p99\n" in text
    assert lines_with(text, "ours adaptive")[0].split()[2:] == ["1.00", "/", "1.49"]
    assert any("2,000 / 2,000" in line for line in lines_with(text, "pyzmq"))
    assert any("2,000, 2,000 / 2,000 (2.5)" in line for line in lines_with(text, "MPICH"))
    assert any(line.split() == ["ours", "adaptive", "2.25"] for line in lines_with(text, "ours adaptive"))
    assert any("4.0 (3.0)" in line for line in lines_with(text, "A2E + E2A, int8, 4 ranks"))
    assert any("0.05" in line for line in lines_with(text, "pyzmq"))
    [line] = [line for line in text.splitlines() if "to   8 ranks" in line]
    assert line.split()[-13:-5] == ["5.00", "/", "6.00", "4.00", "/", "6.00", "1.00,", "1.00"]
    assert line.split()[-5:] == ["8,", "1", "direct", "25", "%"]
    assert 'xccl.route_costs_ns = "1,2,3,4,5,6"' in text
    assert "openmpi (p2p): missing: mpi4py is not installed" in text
    assert "gloo (moe): failed: died" in text


def test_a_report_without_ours_or_without_anything_is_a_table_too() -> None:
    full = report()
    others = [record for record in full.records if not record.way.startswith("ours")]
    assert "MPICH" in render(replace(full, records=others))
    assert render(replace(full, records=[], absences=[], trampolines=[])).count("\n") == 1


def test_json_has_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    write_json(report(), path)
    found = json.loads(path.read_text())
    assert found["schema"] == 1
    assert {"cores", "cpu", "kernel", "load", "versions", "python"} <= set(found["machine"])
    assert found["machine"]["cores"] >= 1 and "numpy" in found["machine"]["versions"]
    assert found["plan"]["ranks"] == [4, 8, 16] and found["plan"]["xccl"]["spin_us"] >= 0
    first = found["records"][1]
    assert first["case"] == ONE and first["way"] == "ours adaptive" and first["to_limit"] == 2.25
    assert {"p50_us", "p99_us", "mean_us", "low_us", "high_us", "samples"} <= set(first)
    assert found["absent"][0] == {
        "section": "p2p",
        "way": "openmpi",
        "is_failure": False,
        "reason": "mpi4py is not installed",
    }


@pytest.mark.parametrize(
    ("size", "name"), [(1, "1 B"), (64, "64 B"), (4096, "4 KiB"), (8 << 20, "8 MiB"), (1500, "1500 B")]
)
def test_sizes_have_names(size: int, name: str) -> None:
    assert size_name(size) == name


def test_a_plot_needs_matplotlib_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs matplotlib, which is not installed"):
        plot.check(tmp_path / "x.png")


def test_a_plot_is_written(tmp_path: Path) -> None:
    plot.check(tmp_path / "x.svg")
    plot.write_plot(report(), tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_what_is_not_installed_is_missing() -> None:
    assert WAYS["ours"].missing() is None and WAYS["pyzmq"].missing() is None
    assert Way("x", ("no_such_module",)).missing() == "no_such_module is not installed"
    assert Way("x", ("sys",), "no-such-launcher").missing() == "no-such-launcher is not installed"


def test_each_rank_is_told_its_number_and_an_mpi_by_its_launcher(tmp_path: Path) -> None:
    plain = launch(WAYS["ours"], 3, tmp_path / "a")
    assert [env["XDS_BENCH_RANK"] for env in plain.environments] == ["0", "1", "2"]
    assert plain.commands[0][0] == sys.executable and plain.environments[0]["OMP_NUM_THREADS"] == "1"
    mpi = launch(WAYS["openmpi"], 16, tmp_path / "a")
    [command], [environment] = mpi.commands, mpi.environments
    assert command[0].endswith("prterun") and command[command.index("-n") + 1] == "16"
    assert environment["PRTE_ALLOW_RUN_AS_ROOT"] == "1" and "XDS_BENCH_RANK" not in environment
    assert environment["MPI4PY_LIBMPI"].endswith("libmpi.so.40")


def test_the_limit_is_shown_by_its_mean_and_is_no_peer() -> None:
    given = report()
    given.records.append(
        Record("moe", "limit", dict(MOE), figures([[500, 1_500]]), {"to_ours": 9.0, "mean_to_ours": 0.25})
    )
    text = render(given)
    assert "1.00 (0.25)" in text
    assert "limit" not in text[text.index("MoE shapes, time relative to ours") :].splitlines()[1]


def test_unevenness_stands_beside_that_of_bare_loops() -> None:
    text = render(report())
    table = text[text.index("MoE shapes, p99 / p50") :].splitlines()
    assert table[1].split() == ["ours", "MPICH"]
    assert table[2].split() == ["A2E", "+", "E2A,", "int8,", "4", "ranks", "3.00,", "1.50:", "2.00"]
