"""Monotonic time. Wall-clock time is never used for liveness, deadlines or ordering."""

from __future__ import annotations

import time
from dataclasses import dataclass

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


def now_ns() -> int:
    """Monotonic nanoseconds; comparable between processes of one host (CLOCK_MONOTONIC)."""
    return time.monotonic_ns()


@dataclass(frozen=True, slots=True)
class Deadline:
    """An absolute point in monotonic time by which a wait must have ended."""

    at_ns: int

    @classmethod
    def after_ms(cls, duration_ms: float) -> Deadline:
        """Return the deadline `duration_ms` from now."""
        return cls(now_ns() + int(duration_ms * NS_PER_MS))

    def remaining_ns(self) -> int:
        """Return the nanoseconds left, 0 when passed."""
        return max(0, self.at_ns - now_ns())

    def expired(self) -> bool:
        """Tell whether the deadline has passed."""
        return now_ns() >= self.at_ns
