"""Processes of the second implementation, and a pod name that nothing stays of."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.segments import fresh_pod
from tests.interop import second

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def sound() -> None:
    if not second.SOUND:
        pytest.skip("plain accesses order nothing here: see second.py")


class Peer:
    """A process of the second implementation: a role of a module of this folder."""

    def __init__(self, module: str, role: str, config: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"tests.interop.{module}", role, json.dumps(config)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.segment = str(self.line()["segment"])

    def line(self) -> dict[str, Any]:
        """Return its next finding; its own deadlines bound the wait."""
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def go_on(self) -> None:
        """Let it begin, or end, if it is one that waits for that."""
        self._write("")

    def tell(self, what: str, **fields: object) -> None:
        """Give it something to do, if it is one that obeys."""
        self._write(json.dumps({"do": what, **fields}))

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def finish(self) -> None:
        """Take its last words: nothing of ours was imported, and it ended well."""
        assert self.line() == {"imported": []}
        assert self.process.wait(20) == 0

    def end(self) -> None:
        """Kill it if it runs, and collect it."""
        self.process.kill()
        self.process.wait(20)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def pod() -> Iterator[str]:
    with fresh_pod("interop") as name:
        yield name


@pytest.fixture
def launch() -> Iterator[Callable[[str, str, dict[str, Any]], Peer]]:
    """Start peers; all have ended after the test."""
    peers: list[Peer] = []

    def run(module: str, role: str, config: dict[str, Any]) -> Peer:
        peers.append(Peer(module, role, config))
        return peers[-1]

    yield run
    for peer in peers:
        peer.end()
