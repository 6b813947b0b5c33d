"""Runs the transports under ThreadSanitizer: `python -m tests.native.race [SCENARIO ...]`; test_race.py does it by label.

What makes the answer sound:

- The sanitizer does not see across processes, so both ends are threads of one process on one mapping (race_scenarios.py).
- Python's lock would order every access of one thread before those of the next, and hide all races. Its mutex lies in
  libpython, whose interceptors are switched off; so only the bus's own atomics order anything.
- What that lock rightly orders, Python's objects, would then be reported. The interpreter is not instrumented, its inline
  functions are calls (race_prelude.h), and a report counts only if its address lies in a segment.
- A mutant whose release or acquire is relaxed must be reported: `mutate` takes the order from a `SYNC:` label's lines.

Known limits: fences are not modelled (`cell-torn` is for the litmus tests), nor is what NumPy reads in its own loops.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bus.memory.segment import segment_prefix, sweep
from tests.native.build import build_all, compiler
from tests.native.sanitize import copy_tree

SCENARIOS = ("p2p", "ring", "dispatch", "relay")
TIMEOUT_S = 240
RACE = re.compile(r"WARNING: ThreadSanitizer: data race")
ADDRESS = re.compile(r"(?:Read|Write|Atomic read|Atomic write) of size \d+ at (0x[0-9a-f]+)", re.IGNORECASE)
MAPPING = re.compile(r"segment (0x[0-9a-f]+) (\d+)")


def runtime() -> Path | None:
    """Return the sanitizer's runtime library, None if the compiler has none."""
    found = subprocess.run(
        [*compiler(), "-print-file-name=libtsan.so"], check=True, capture_output=True, text=True, timeout=60
    )
    path = Path(found.stdout.strip())
    return path.resolve() if path.is_absolute() else None


def python_library() -> str:
    """Return the name of what holds the interpreter's code: a shared library, or the interpreter itself."""
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        return str(sysconfig.get_config_var("INSTSONAME"))
    return Path(sys.executable).resolve().name


@dataclass
class Outcome:
    """What a run showed: its exit status, its races in segments, and everything that it wrote."""

    status: int = -1
    races: list[str] = field(default_factory=list)
    text: str = ""


@contextmanager
def tree() -> Iterator[Path]:
    """A copy of the bus and its tests, without extensions."""
    with tempfile.TemporaryDirectory(prefix="xds-race-") as name:
        copy_tree(Path(name))
        (Path(name) / "suppressions").write_text(f"called_from_lib:{python_library()}\n", encoding="ascii")
        yield Path(name)


def build(directory: Path) -> None:
    """Build the extensions of the copy with the sanitizer."""
    prelude = str(directory / "tests" / "native" / "race_prelude.h")
    flags = ["-O1", "-fno-omit-frame-pointer", "-fsanitize=thread", "-Wno-tsan", "-include", prelude]
    build_all(directory / "bus" / "memory", flags, directory)


def mutate(directory: Path, files: str, label: str, order: str) -> int:
    """Relax `order` (RELEASE, ACQUIRE) on all lines of `files` (a pattern) that bear the label; return how many."""
    count = 0
    for path in (directory / "bus" / "memory").glob(files):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for i, line in enumerate(lines):
            if f"SYNC: {label}" in line and f"__ATOMIC_{order}" in line and "fence" not in line:
                lines[i] = line.replace(f"__ATOMIC_{order}", "__ATOMIC_RELAXED")
                count += 1
        path.write_text("".join(lines), encoding="utf-8")
    return count


def run(directory: Path, scenario: str, *, until_race: bool = False) -> Outcome:
    """Run a scenario on the copy; with `until_race` it is killed once it has raced."""
    options = f"suppressions={directory / 'suppressions'} suppress_equal_stacks=0 suppress_equal_addresses=0"
    env = {
        **os.environ,
        "LD_PRELOAD": str(runtime()),
        "TSAN_OPTIONS": f"{options} exitcode=0 symbolize={0 if until_race else 1}",
        "PYTHONPATH": str(directory),
        "PYTHONMALLOC": "malloc",  # so that memory which is used again is known to be new
        "OPENBLAS_NUM_THREADS": "1",
    }
    pod = f"race{uuid.uuid4().hex[:10]}"
    process = subprocess.Popen(
        [sys.executable, "tests/native/race_scenarios.py", scenario, pod],
        cwd=directory,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watchdog = threading.Timer(TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        return judge(process, until_race=until_race)
    finally:
        watchdog.cancel()
        sweep(segment_prefix(pod))


def judge(process: subprocess.Popen[str], *, until_race: bool) -> Outcome:
    """Read what the process writes until it ends; count the reports about bytes of segments."""
    outcome, segments, is_race = Outcome(), [], False
    assert process.stdout is not None
    for line in process.stdout:
        outcome.text += line
        if match := MAPPING.match(line):
            start = int(match[1], 16)
            segments.append(range(start, start + int(match[2])))
        if RACE.search(line):
            is_race = True
        elif is_race and (match := ADDRESS.search(line)):
            is_race = False
            if any(int(match[1], 16) in segment for segment in segments):
                outcome.races.append(line.strip())
                if until_race:
                    process.kill()
                    break
    process.stdout.close()
    outcome.status = process.wait()
    return outcome


def main(scenarios: list[str]) -> int:
    failed = 0
    with tree() as directory:
        build(directory)
        for scenario in scenarios or SCENARIOS:
            outcome = run(directory, scenario)
            is_bad = bool(outcome.races) or outcome.status != 0
            print(f"{scenario}: status {outcome.status}, {len(outcome.races)} races in segments", flush=True)
            failed += is_bad
            if is_bad:
                print(outcome.text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
