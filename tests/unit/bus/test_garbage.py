"""Managed garbage collection: what is frozen, when it collects, and that cycles do go away."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from bus import garbage
from bus.garbage import TURNS_PER_COLLECTION, YOUNG_PER_FULL, ManagedGc


class Node:
    """Part of a cycle."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def lost_cycle() -> weakref.ref[Node]:
    return weakref.ref(Node())


def test_taking_over_freezes_what_is_there_and_ends_automatic_collection() -> None:
    managed = ManagedGc("managed")
    managed.take_over()
    assert not gc.isenabled()
    assert gc.get_freeze_count() > 1000


def test_auto_leaves_python_alone() -> None:
    auto = ManagedGc("auto")
    auto.take_over()
    assert gc.isenabled()
    for _ in range(TURNS_PER_COLLECTION * 2):
        auto.turn()
    auto.idle()
    assert auto.num_collections == 0


def test_young_garbage_goes_after_some_hundred_turns_and_not_before() -> None:
    managed = ManagedGc("managed")
    managed.take_over()
    cycle = lost_cycle()
    for _ in range(TURNS_PER_COLLECTION - 1):
        managed.turn()
    assert cycle() is not None
    managed.turn()
    assert cycle() is None
    assert managed.num_collections == 1


def test_garbage_that_grew_old_goes_with_a_full_collection() -> None:
    managed = ManagedGc("managed")
    managed.take_over()
    node = Node()
    cycle = weakref.ref(node)
    for _ in range(2 * TURNS_PER_COLLECTION):
        managed.turn()
    del node  # it has survived two collections of the young
    for _ in range(TURNS_PER_COLLECTION):
        managed.turn()
    assert cycle() is not None
    for _ in range(TURNS_PER_COLLECTION * YOUNG_PER_FULL):
        managed.turn()
    assert cycle() is None


def test_an_idle_process_collects_what_is_worth_it_and_then_sleeps() -> None:
    managed = ManagedGc("managed")
    managed.take_over()
    cycles = [lost_cycle() for _ in range(garbage.IDLE_ALLOCATIONS * 2)]
    managed.idle()
    assert not any(cycle() for cycle in cycles)
    managed.idle()
    assert managed.num_collections == 1


async def test_an_event_loop_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "WATCH_INTERVAL_S", 0.0)
    managed = ManagedGc("managed")
    managed.take_over()
    cycle, others = lost_cycle(), [lost_cycle() for _ in range(garbage.IDLE_ALLOCATIONS)]
    busy = True
    watching = asyncio.create_task(managed.watch(lambda: not busy))
    for _ in range(10):
        await asyncio.sleep(0)
    assert cycle() is not None
    busy = False
    for _ in range(10):
        await asyncio.sleep(0)
    assert cycle() is None
    watching.cancel()
    assert not any(other() for other in others)
