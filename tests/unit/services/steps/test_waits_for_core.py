"""A hot loop that is silent because the machine is busy is told from one that hangs."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

from services.steps.hot_loop import HotLoop
from tests.harness.poll import eventually


def loop_with(run: Any) -> HotLoop:
    thread = threading.Thread(target=run, daemon=True)
    loop = cast("HotLoop", SimpleNamespace(_thread=thread))
    assert not HotLoop.waits_for_core(loop), "it has not begun"
    thread.start()
    return loop


def test_a_thread_that_computes_waits_for_a_core_and_one_that_sleeps_does_not() -> None:
    ends = threading.Event()

    def compute() -> None:
        while not ends.is_set():
            sum(range(1000))

    computing, sleeping = loop_with(compute), loop_with(ends.wait)
    eventually(lambda: HotLoop.waits_for_core(computing), timeout_s=10, what="a running thread")
    eventually(lambda: not HotLoop.waits_for_core(sleeping), timeout_s=10, what="a sleeping thread")
    ends.set()
    for loop in (computing, sleeping):
        loop._thread.join()
        assert not HotLoop.waits_for_core(loop), "it has ended"
