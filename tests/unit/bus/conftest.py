"""A pod name of one's own for every test, and proof that nothing of it stays in shared memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.segments import fresh_pod


@pytest.fixture
def pod() -> Iterator[str]:
    with fresh_pod("unit") as name:
        yield name
