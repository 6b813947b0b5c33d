"""Two real processes on one core or on two, a segment between them, and nothing left behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment, segment_name, segment_prefix, sweep, total_bytes
from tests.native.build import build_extension, extensions

ROOT = Path(__file__).resolve().parents[2]
LINE_TIMEOUT_S = 30


class Child:
    """A process that runs one role of child.py, on the given CPUs."""

    def __init__(self, role: str, *args: object, cpus: set[int], extension: Path | None = None) -> None:
        script = ["child.py"] if extension is None else ["fault_child.py", str(extension)]
        script[0] = str(Path(__file__).with_name(script[0]))
        self.process = subprocess.Popen(
            [sys.executable, *script, role, *map(str, args)],
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

    def line(self) -> str:
        """Return the next line that the child printed."""
        return self._lines.get(timeout=LINE_TIMEOUT_S)

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
    name = f"litmus{uuid.uuid4().hex[:12]}"
    yield name
    sweep(segment_prefix(name))
    assert total_bytes(segment_prefix(name)) == 0


@pytest.fixture(scope="session")
def faulty_extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C extension, built so that it can be told to kill its process at a fault point."""
    directory = tmp_path_factory.mktemp("faulty")
    sources = dict(extensions())["_native"]
    return build_extension("_native", sources, directory, ["-O2", "-DXDS_FAULT_POINTS"])


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

    def start(role: str, *args: object, cpus: set[int] | None = None, extension: Path | None = None) -> Child:
        children.append(Child(role, *args, cpus=cpus or os.sched_getaffinity(0), extension=extension))
        return children[-1]

    yield start
    for child in children:
        child.end()
