"""Waiting for a predicate instead of sleeping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


def eventually(
    predicate: Callable[[], bool], *, timeout_s: float, what: str = "predicate", interval_s: float = 0.05
) -> None:
    """Return once `predicate()` is true; AssertionError naming `what` after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(interval_s)


async def async_eventually(
    predicate: Callable[[], bool], *, timeout_s: float, what: str = "predicate", interval_s: float = 0.02
) -> None:
    """Return once `predicate()` is true; AssertionError naming `what` after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        await asyncio.sleep(interval_s)
