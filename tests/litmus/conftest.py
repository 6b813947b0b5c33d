"""Two real processes on one core or on two, a segment between them, and nothing left behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment, segment_name
from tests.harness.segments import fresh_pod
from tests.native.build import build_all

ROOT = Path(__file__).resolve().parents[2]
LINE_TIMEOUT_S = 30
ENDED = "(it has ended)"
SILENT = f"(it says nothing for {LINE_TIMEOUT_S} s)"


class Child:
    """A process that runs one role of a script of this folder, on the given CPUs."""

    def __init__(
        self, role: str, *args: object, cpus: set[int], build: Path | None = None, script: str = "child.py"
    ) -> None:
        here = Path(__file__).parent
        command = [str(here / script)]
        if build is not None:
            command = [str(here / "fault_child.py"), str(build), *command]
        self.process = subprocess.Popen(
            [sys.executable, *command, role, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        os.sched_setaffinity(self.process.pid, cpus)
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(ENDED)

    def line(self) -> str:
        """Return the next line that the child printed, ENDED or SILENT."""
        try:
            return self._lines.get(timeout=LINE_TIMEOUT_S)
        except queue.Empty:
            return SILENT

    def say(self, line: str) -> None:
        """Give it a line to read."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def wait(self) -> int:
        """Return its exit status once it has ended by itself."""
        return self.process.wait(LINE_TIMEOUT_S)

    def end(self) -> None:
        """Kill it if it still runs and collect it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(LINE_TIMEOUT_S)
        self._reader.join(LINE_TIMEOUT_S)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def pod() -> Iterator[str]:
    with fresh_pod("litmus") as name:
        yield name


@pytest.fixture(scope="session")
def faulty_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C extensions, built so that they can be told to kill their process at a fault point."""
    directory = tmp_path_factory.mktemp("faulty")
    build_all(directory, ["-O1", "-DXDS_FAULT_POINTS"])
    return directory


@pytest.fixture
def segment(pod: str) -> Iterator[Segment]:
    """A segment of this process with 16 cells, room for a ring, and 16 MiB of app area."""
    name = segment_name(pod, "attention", 0, 1)
    layout = SegmentLayout(16, 1 << 20, 1 << 24)
    owned = Segment.create(name, layout, service="attention", index=0, incarnation=1)
    yield owned
    owned.unlink()
    owned.close()


@pytest.fixture(params=["one-core", "two-cores"])
def cpus(request: pytest.FixtureRequest) -> Iterator[list[set[int]]]:
    """[own CPUs, child's CPUs]; this process is pinned for the test's duration."""
    allowed = os.sched_getaffinity(0)
    first, last = min(allowed), max(allowed)
    if request.param == "two-cores" and first == last:
        pytest.skip("this machine lends a single core")
    pair = [{first}, {first if request.param == "one-core" else last}]
    os.sched_setaffinity(0, pair[0])
    yield pair
    os.sched_setaffinity(0, allowed)


@pytest.fixture
def spawn(pod: str) -> Iterator[Callable[..., Child]]:
    """Start children; all have ended before the pod is looked through for leftovers."""
    children: list[Child] = []

    def start(role: str, *args: object, cpus: set[int] | None = None, **how: Any) -> Child:
        children.append(Child(role, *args, cpus=cpus or os.sched_getaffinity(0), **how))
        return children[-1]

    yield start
    for child in children:
        child.end()
