"""Slices and nice values: what the kernel permits is in force afterwards, the rest is left as it was."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from bus import priority
from bus.priority import prioritise


def in_a_thread(function: Callable[[], Any]) -> Any:
    """Return what `function` returns in a thread of its own, whose priority nobody else has."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(10)
    return results[0]


def slices_are_known() -> bool:
    found = in_a_thread(lambda: prioritise(0))
    return found is not None and found[0] > 0


NEEDS_SLICES = pytest.mark.skipif(
    not slices_are_known(), reason="this kernel has no slices of threads (6.12)"
)


@NEEDS_SLICES
@pytest.mark.parametrize("slice_us", [100, 700, 100_000])
def test_a_slice_is_asked_for_and_the_nice_value_stays(slice_us: int) -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    assert in_a_thread(lambda: prioritise(slice_us)) == (slice_us, nice)


@NEEDS_SLICES
def test_threads_inherit_it() -> None:
    def start_another() -> Any:
        prioritise(300)
        return in_a_thread(lambda: prioritise(0))

    assert in_a_thread(start_another)[0] == 300


def test_a_nice_value_may_rise_and_ends_at_19() -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    assert in_a_thread(lambda: prioritise(0, 2))[1] == min(19, nice + 2)
    assert in_a_thread(lambda: prioritise(0, 99))[1] == 19
    assert os.getpriority(os.PRIO_PROCESS, 0) == nice


@NEEDS_SLICES
def test_what_is_not_permitted_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses a lower nice value; the slice is granted all the same."""
    call, numbers = priority._call, priority._NUMBERS[os.uname().machine]

    def refuse(number: int, *arguments: Any) -> bool:
        if number == numbers[0] and arguments[1]._obj.nice < os.getpriority(os.PRIO_PROCESS, 0):
            return False
        return call(number, *arguments)

    monkeypatch.setattr(priority, "_call", refuse)
    assert in_a_thread(lambda: prioritise(250, -5)) == (250, os.getpriority(os.PRIO_PROCESS, 0))


def test_an_unknown_system_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priority, "_NUMBERS", {})
    assert in_a_thread(lambda: prioritise(100, 5)) is None


@pytest.mark.parametrize("slice_us", [-1, 1, 99, 100_001])
def test_a_slice_outside_the_kernels_bounds_is_refused(slice_us: int) -> None:
    with pytest.raises(ValueError, match=f"slice_us: {slice_us} must be 0 or 100..100000"):
        prioritise(slice_us)
