from __future__ import annotations

import asyncio

import pytest

from bus.clock import Deadline
from bus.control import messages
from bus.control.podmap import PodMapHolder, find
from bus.errors import RequestTimeout

EXPERT = messages.Member(service="expert", index=1, incarnation=2, pid=3, state="ready")


def pod_map(epoch: int, healthy: bool = False) -> messages.PodMap:
    return messages.PodMap(pod="p", epoch=epoch, members=(EXPERT,), healthy=healthy)


async def test_only_newer_maps_are_taken() -> None:
    holder = PodMapHolder("p")
    heard: list[int] = []
    holder.listen(lambda new: heard.append(new.epoch))
    assert [holder.offer(pod_map(epoch)) for epoch in (5, 5, 4, 7)] == [True, False, False, True]
    assert heard == [5, 7]
    assert holder.current.epoch == 7


async def test_waiting_for_a_map() -> None:
    holder = PodMapHolder("p")
    waiting = asyncio.create_task(holder.wait_for(lambda new: new.healthy, Deadline.after_ms(5000)))
    await asyncio.sleep(0)
    holder.offer(pod_map(1))
    holder.offer(pod_map(2, healthy=True))
    assert (await waiting).epoch == 2
    assert (await holder.wait_for(lambda new: new.healthy, Deadline.after_ms(0))).epoch == 2


async def test_waiting_ends_at_the_deadline() -> None:
    with pytest.raises(RequestTimeout, match="no pod map"):
        await PodMapHolder("p").wait_for(lambda new: new.healthy, Deadline.after_ms(10))


def test_find() -> None:
    assert find(pod_map(1), "expert", 1) == EXPERT
    assert find(pod_map(1), "expert", 0) is None
