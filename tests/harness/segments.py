"""Shared memory of a test: a pod name of its own, and proof that nothing of it stays."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from bus.memory.segment import segment_prefix, sweep, total_bytes


@contextmanager
def fresh_pod(prefix: str) -> Iterator[str]:
    """A name that begins with `prefix`; in the end what dead owners left is swept, and no segment may be left."""
    name = f"{prefix}{uuid.uuid4().hex[:12]}"
    yield name
    sweep(segment_prefix(name))
    assert total_bytes(segment_prefix(name)) == 0
