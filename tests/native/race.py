"""Runs the transports under ThreadSanitizer: `python -m tests.native.race [SCENARIO ...]`; see also test_race.py.

What makes the answer sound:

- The sanitizer does not see across processes, so both ends are threads of one process on one mapping, see
  race_scenarios.py.
- Python's lock would order every access of one thread before those of the next, and hide all races. Its mutex lies in
  libpython, whose interceptors are switched off; so only the bus's own atomics order anything.
- NumPy's interceptors are off for the same reason, and its allocator keeps nothing back (race_memory.c).
- What that lock rightly orders, Python's objects, would then be reported. The interpreter is not instrumented, its
  inline functions are calls (race_prelude.h), and a report counts only if its address lies in a segment.
- Mutants must be reported: `mutate` takes the order from all lines with a `SYNC:` label. Where a doorbell is rung after
  every publication it orders as well, so both are relaxed. `leave_out` takes what the lines of a label write.

Known limits: fences are not modelled (`cell-torn` is for the litmus tests), nor is what NumPy reads and writes seen.
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
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bus.memory.segment import segment_prefix, sweep
from tests.native.build import ExtensionSource, build_all, build_extension, compiler
from tests.native.sanitize import copy_tree

SCENARIOS = ("p2p", "lanes", "share", "ring", "dispatch", "withdraw", "alltoall", "relay")
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
        libraries = (python_library(), "_multiarray_umath", "race_memory")
        lines = [f"called_from_lib:{library}\n" for library in libraries]
        (Path(name) / "suppressions").write_text("".join(lines), encoding="ascii")
        yield Path(name)


def build(directory: Path) -> None:
    """Build the extensions of the copy with the sanitizer."""
    prelude = str(directory / "tests" / "native" / "race_prelude.h")
    flags = ["-O1", "-fno-omit-frame-pointer", "-fsanitize=thread", "-Wno-tsan", "-include", prelude]
    build_all(directory / "bus" / "memory", flags, directory)
    memory = directory / "tests" / "native" / "race_memory.c"
    numpy = ("-std=gnu11", f"-I{np.get_include()}")
    build_extension(ExtensionSource("race_memory", (memory,), numpy), directory, ["-O1"])


def mutate(directory: Path, labels: Collection[str], orders: Collection[str]) -> int:
    """Relax these orders on all lines that bear one of the labels, but for fences; return how many lines."""
    count = 0
    for path in (directory / "bus" / "memory").glob("*.[ch]"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for i, line in enumerate(lines):
            if any(f"SYNC: {label}" in line for label in labels) and "fence" not in line:
                lines[i] = re.sub(f"__ATOMIC_({'|'.join(orders)})", "__ATOMIC_RELAXED", line)
                count += lines[i] != line
        path.write_text("".join(lines), encoding="utf-8")
    return count


def leave_out(directory: Path, name: str, label: str) -> int:
    """Let the loops of `name` that bear the label do nothing; return how many."""
    path = directory / "bus" / "memory" / name
    loop = re.compile(rf"(for \([^;]*;) [^;]*(;[^;]*\) \{{ /\* SYNC: {label})")
    text, count = loop.subn(r"\1 0\2", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
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
