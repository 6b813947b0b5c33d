"""`xds bench bus` with real processes: what it writes, and that nothing of it is left, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.bench.peers.ours_paths import PATHS
from tests.harness.poll import eventually

ROOT = Path(__file__).resolve().parents[2]
SHM = Path("/dev/shm")
TIMEOUT_S = 120.0
SMALL = ("--ranks", "2", "--batch", "2", "--hidden", "64", "--top-k", "2", "--sizes", "64", "5000")
ENDLESS = ("--only", "moe", "--peers", "ours", "--kinds", "float32", "--rounds", "1000", *SMALL)


class Bench:
    """A run of the command."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.errors = folder / "stderr"
        self.output = folder / "stdout"
        with self.errors.open("wb") as errors, self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "services.cli", "bench", "bus", "--quick", *arguments],
                stdout=output,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
        self.name = f"xdsbench{self.process.pid}x"

    def wait(self) -> int:
        """Return the exit code."""
        return self.process.wait(TIMEOUT_S)

    def text(self) -> str:
        """Return what it has said on stderr."""
        return self.errors.read_text()

    def wait_for(self, words: str) -> None:
        """Return once it has said `words`."""
        eventually(lambda: words in self.text(), timeout_s=TIMEOUT_S, what=f"{words!r} on stderr")

    def workers(self) -> list[int]:
        """Return the ids of its processes that live."""
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._is_worker(path)]

    def _is_worker(self, path: Path) -> bool:
        try:
            return f"/{self.name}" in (path / "environ").read_text(errors="replace")
        except OSError:
            return False

    def shared(self) -> list[str]:
        """Return what it has in /dev/shm."""
        return [path.name for path in SHM.iterdir() if self.name in path.name]

    def assert_nothing_is_left(self) -> None:
        eventually(lambda: not self.workers(), timeout_s=10, what="no process of the run lives")
        assert self.shared() == []


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[Bench]]:
    """Runs to end if the test did not."""
    started: list[Bench] = []
    yield started
    for bench in started:
        bench.process.kill()
        bench.process.wait()


def test_a_run_reports_all_sections_and_leaves_nothing(tmp_path: Path, runs: list[Bench]) -> None:
    found = tmp_path / "found.json"
    sections = ("--only", "p2p,crowd,all-to-all,moe,thresholds")
    bench = Bench(tmp_path, "--peers", "pyzmq,pipe", "--rounds", "1", "--json", str(found), *sections, *SMALL)
    runs.append(bench)
    assert bench.wait() == 0, bench.text()
    bench.assert_nothing_is_left()
    report = json.loads(found.read_text())
    records = report["records"]
    by_section = {
        section: {r["way"] for r in records if r["section"] == section}
        for section in ("p2p", "all-to-all", "moe", "thresholds")
    }
    assert by_section["all-to-all"] == {"ours", "ours persistent", "pyzmq"}
    assert {
        "C limit",
        "ours spin",
        "ours adaptive",
        "ours blocking",
        "ours pull",
        "ours zero-copy",
        "ours zero-copy, handed over",
    } < by_section["p2p"]
    assert {"pyzmq", "Pipe"} < by_section["p2p"]
    assert by_section["thresholds"] == set(PATHS)
    crowd = {r["way"] for r in records if r["section"] == "crowd"}
    assert {"ours adaptive", "ours blocking", "pyzmq"} < crowd
    assert ("ours adaptive, nice -10" in crowd) is all(a["way"] != "ours-nice" for a in report["absent"])
    assert by_section["moe"] == {"ours", "ours trampoline", "limit", "pyzmq"}
    assert all(r["p50_us"] > 0 and r["p99_us"] >= r["low_us"] > 0 and r["samples"] > 0 for r in records)
    limited = [r for r in records if r["way"] == "ours adaptive" and r["case"].get("scenario") == "one pair"]
    assert [r["case"]["size"] for r in limited] == [64, 5000] and all(r["to_limit"] > 0 for r in limited)
    scenarios = {r["case"]["scenario"] for r in records if r["section"] in ("p2p", "crowd")}
    assert {"one pair", "4 pairs", "sleeping waiter"} < scenarios and len(scenarios) == 5
    text = bench.output.read_text()
    assert "one pair, one way, us: p50 / p99" in text and "dispatch + combine, 2 ranks" in text


def test_ctrl_c_ends_everything(tmp_path: Path, runs: list[Bench]) -> None:
    bench = Bench(tmp_path, *ENDLESS)
    runs.append(bench)
    bench.wait_for("1 of 2: dispatch + combine")
    assert len(bench.workers()) == 2 and bench.shared()
    bench.process.send_signal(signal.SIGINT)
    assert bench.wait() == 128 + signal.SIGINT
    assert bench.text().endswith("xds: bench: interrupted\n")
    bench.assert_nothing_is_left()


def test_a_killed_process_is_named_and_the_run_fails(tmp_path: Path, runs: list[Bench]) -> None:
    bench = Bench(tmp_path, *ENDLESS)
    runs.append(bench)
    bench.wait_for("1 of 2: dispatch + combine")
    victim = bench.workers()[-1]
    os.kill(victim, signal.SIGKILL)
    assert bench.wait() == 1
    last = bench.text().splitlines()[-1]
    assert last.startswith("xds: bench: ours failed in moe: rank ") and f"(pid {victim}) ended" in last
    bench.assert_nothing_is_left()


def test_processes_end_with_a_killed_run_and_the_next_one_removes_the_rest(
    tmp_path: Path, runs: list[Bench]
) -> None:
    bench = Bench(tmp_path, *ENDLESS)
    runs.append(bench)
    bench.wait_for("1 of 2: dispatch + combine")
    bench.process.kill()
    bench.wait()
    eventually(lambda: not bench.workers(), timeout_s=10, what="no process of the run lives")
    assert bench.shared()
    following = Bench(tmp_path, *ENDLESS, "--rounds", "1")
    runs.append(following)
    assert following.wait() == 0, following.text()
    assert bench.shared() == []
    following.assert_nothing_is_left()
