"""Waiting for a predicate instead of sleeping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path


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


def is_running(pid: int) -> bool:
    """Tell whether a process exists and has not ended (an unreaped orphan has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
