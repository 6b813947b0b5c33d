"""The paper's pod in shared memory: 480 attention ranks in 3 DP domains and 288 expert ranks, in 16 processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.memory.segment import segment_prefix, total_bytes

ROOT = Path(__file__).resolve().parents[2]
NUM_PROCESSES, NUM_DOMAINS, ATTENTION_RANKS = 16, 3, 480
SHARED_BYTES_MAX = 1 << 30


@pytest.fixture
def hosts(pod: str) -> Iterator[list[subprocess.Popen[str]]]:
    script = str(Path(__file__).with_name("many_ranks_child.py"))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, script, pod, str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for index in range(NUM_PROCESSES)
    ]
    yield children
    for child in children:
        if child.poll() is None:
            child.kill()
        child.communicate(timeout=20)


def line(child: subprocess.Popen[str]) -> list[str]:
    assert child.stdout is not None
    return child.stdout.readline().split()


def test_160_attention_and_288_expert_ranks_exchange_through_trampolines(
    pod: str, hosts: list[subprocess.Popen[str]]
) -> None:
    assert [line(child) for child in hosts] == [["ready"]] * NUM_PROCESSES
    assert total_bytes(segment_prefix(pod)) < SHARED_BYTES_MAX
    for domain in range(NUM_DOMAINS):  # one DP domain at a time exchanges with the experts
        for child in hosts:
            assert child.stdin is not None
            child.stdin.write(f"{domain}\n")
            child.stdin.flush()
        answers = [line(child) for child in hosts]
        assert all(answer[:2] == ["done", str(domain)] for answer in answers)
        # One metadata write per attention rank and exchange, instead of one per expert rank that it needs.
        writes = sum(int(answer[2]) for answer in answers)
        assert writes == (domain + 1) * ATTENTION_RANKS // NUM_DOMAINS
    for child in hosts:
        assert child.stdin is not None
        child.stdin.close()
        child.stdin = None
    for child in hosts:
        word, num_mapped = line(child)
        # Mapped were the peers that it needed, at most once each, not the pod times the 48 ranks that it hosts.
        assert word == "mapped" and int(num_mapped) <= 768
        assert child.wait(20) == 0
