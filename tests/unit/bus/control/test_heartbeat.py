from __future__ import annotations

import pytest

from bus.clock import NS_PER_MS
from bus.control import heartbeat
from bus.control.heartbeat import LoopWatch


def test_a_loop_that_turns_is_vouched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    time_ns = 0
    monkeypatch.setattr(heartbeat, "now_ns", lambda: time_ns)
    watch = LoopWatch(stall_ms=100)
    time_ns = 99 * NS_PER_MS
    assert watch()
    time_ns = 100 * NS_PER_MS
    assert not watch()
    watch.tick()
    assert watch()
