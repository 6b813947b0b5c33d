"""Three processes exchange rows that testify; one is killed between its steps, and the others name it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUM_RANKS = 3


@contextmanager
def ranks(
    pod: str, fault_points: list[str], steps: int, poll_ms: int = 20
) -> Iterator[list[subprocess.Popen[str]]]:
    """One process per rank, all ready before the first begins."""
    script = str(Path(__file__).with_name("collectives_child.py"))
    children = [
        subprocess.Popen(
            [sys.executable, script, pod, str(rank), point, str(steps), str(poll_ms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for rank, point in enumerate(fault_points)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        yield children
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.communicate(timeout=20)


def test_three_processes_exchange_what_they_should(pod: str) -> None:
    # Nobody looks up by himself within the deadlines of an exchange: a lost wake-up would end it.
    with ranks(pod, ["none"] * NUM_RANKS, 1_000, poll_ms=60_000) as children:
        for child in children:
            output, _ = child.communicate(timeout=60)
            assert (child.returncode, output) == (0, "done 1000\n")


@pytest.mark.parametrize("fault_point", ["staged", "counted", "pulled"])
def test_the_survivors_name_the_killed_rank(pod: str, fault_point: str) -> None:
    # In step 4 every rank has rows at every other, so nobody gets past the dead one's answer.
    with ranks(pod, ["none", fault_point, "none"], 4) as children:
        outputs = [child.communicate(timeout=60)[0] for child in children]
        assert children[1].returncode == -signal.SIGKILL
        for rank in (0, 2):
            assert outputs[rank] == "died 4 expert-1\n"
            assert children[rank].returncode == 0
