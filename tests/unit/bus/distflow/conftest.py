"""A pod name of one's own for every test, and proof that nothing of it stays; a source and a sink."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from bus.memory.segment import segment_prefix, sweep, total_bytes
from tests.harness.transfer_world import SinkSide, SourceSide


@pytest.fixture
def pod() -> Iterator[str]:
    name = f"unit{uuid.uuid4().hex[:12]}"
    yield name
    sweep(segment_prefix(name))
    assert total_bytes(segment_prefix(name)) == 0


@pytest.fixture
def prefill(pod: str) -> Iterator[SourceSide]:
    side = SourceSide(pod)
    yield side
    side.close()


@pytest.fixture
def decode() -> Iterator[SinkSide]:
    side = SinkSide()
    yield side
    side.close()
