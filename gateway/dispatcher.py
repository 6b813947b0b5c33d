"""The job executor's shell: performs its instructions, and feeds it what schedulers and the pod map say.

One link (a DEALER) per DP group and incarnation of its scheduler: a new incarnation gets a new link, and
the old one is closed, so nothing that was meant for a dead scheduler can reach the next. A link that
cannot take an `AddRequest` says so, and the core decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from bus.clock import NS_PER_S, now_ns
from bus.control.messages import Member, Message, PodMap
from bus.control.podmap import find
from gateway.choices import ChoicePlan
from gateway.core import JobExecutor
from gateway.events import (
    ClientLeft,
    ClientSubmitted,
    DeliverError,
    DeliverFinish,
    Delivery,
    Event,
    GroupsChanged,
    GroupView,
    Instruction,
    SchedulerMessage,
    SchedulerSaid,
    SendAbort,
    SendAddRequest,
    SendRefused,
    StopStringMet,
    Tick,
)
from gateway.inbox import Inbox

log = structlog.get_logger(__name__)


class Link(Protocol):
    """A connection to one incarnation of one scheduler."""

    def send(self, message: Message) -> bool:
        """Queue at once; False when the peer cannot take it."""
        ...

    def close(self) -> None:
        """End it; nothing is delivered any more."""
        ...


Listener = Callable[[SchedulerMessage], None]
Connect = Callable[[str, Listener], Link]  # (endpoint, what to call with each message)


@dataclass(slots=True)
class _Group:
    view: GroupView
    link: Link


class Dispatcher:
    """Event loop only. `connect` makes links; `core` decides."""

    def __init__(self, core: JobExecutor, connect: Connect) -> None:
        self.core = core
        self._connect = connect
        self._groups: dict[int, _Group] = {}
        self._inboxes: dict[str, tuple[Inbox, int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    # ------------------------------------------------------------------ clients

    def submit(self, plan: ChoicePlan, inbox: Inbox) -> None:
        """Have the choice computed; deliveries for it go to `inbox`."""
        self._inboxes[plan.request_id] = (inbox, plan.index)
        self._handle(ClientSubmitted(plan.request_id, plan.prompt_token_ids, plan.sampling))

    def leave(self, request_id: str, *, stop_string_met: bool) -> None:
        """Nobody wants more of the choice. Unknown ids are ignored."""
        self._inboxes.pop(request_id, None)
        self._handle(StopStringMet(request_id) if stop_string_met else ClientLeft(request_id))

    def end_all(self, status: int, code: str, message: str) -> None:
        """End every request with an error, as the gateway stops."""
        for request_id, (inbox, choice) in list(self._inboxes.items()):
            self.leave(request_id, stop_string_met=False)
            inbox.put(choice, DeliverError(request_id, status, code, message, 1))

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return self._is_idle.is_set()

    async def wait_idle(self) -> None:
        """Return when no request is unfinished."""
        await self._is_idle.wait()

    # ------------------------------------------------------------------ the pod

    def take_pod_map(self, pod_map: PodMap) -> None:
        """Connect to new incarnations of schedulers, drop dead ones, and tell the core.

        A scheduler that the map does not list at all is kept: a restarted manager learns its members only
        one by one. Only a member listed as dead, or with a newer incarnation, has lost its requests.
        """
        for member in pod_map.members:
            if member.service == "scheduler":
                self._take_scheduler(member, member.index in pod_map.serving_dp_groups)
        listed = {member.index for member in pod_map.members if member.service == "scheduler"}
        for dp_group, group in self._groups.items():
            if dp_group not in listed:
                group.view = replace(group.view, serving=False)
            worker = find(pod_map, "attention", dp_group)
            if worker is not None:
                group.view = replace(group.view, executor_incarnation=worker.incarnation)
        self._handle(GroupsChanged({dp_group: group.view for dp_group, group in self._groups.items()}))

    def close(self) -> None:
        """Close all links and stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for dp_group in list(self._groups):
            self._drop(dp_group)

    def _take_scheduler(self, member: Member, serving: bool) -> None:
        known = self._groups.get(member.index)
        if known is not None and member.incarnation < known.view.incarnation:
            return  # fenced
        if member.state == "dead" or not member.endpoint:
            if known is not None and (member.state == "dead" or member.incarnation > known.view.incarnation):
                self._drop(member.index)
            return
        view = GroupView(member.incarnation, serving)
        if known is not None and known.view.incarnation == member.incarnation:
            known.view = replace(known.view, serving=serving)
            return
        if known is not None:
            self._drop(member.index)
        log.info("scheduler found", dp_group=member.index, scheduler_incarnation=member.incarnation)
        self._groups[member.index] = _Group(
            view, self._connect(member.endpoint, self._listener(member.index, member.incarnation))
        )

    def _listener(self, dp_group: int, incarnation: int) -> Listener:
        def listen(message: SchedulerMessage) -> None:
            group = self._groups.get(dp_group)
            if group is not None and group.view.incarnation == incarnation:
                self._handle(SchedulerSaid(dp_group, message))

        return listen

    def _drop(self, dp_group: int) -> None:
        log.info("scheduler lost", dp_group=dp_group)
        self._groups.pop(dp_group).link.close()

    # ------------------------------------------------------------------ the core

    def _handle(self, event: Event) -> None:
        events: list[Event] = [event]
        while events:  # refused sends come back as events; the core's back-off ends that
            events += self._perform(self.core.handle(events.pop(0), now_ns()))
        self._set_timer()
        if self.core.num_jobs():
            self._is_idle.clear()
        else:
            self._is_idle.set()

    def _perform(self, instructions: Iterable[Instruction]) -> list[Event]:
        refusals: list[Event] = []
        for instruction in instructions:
            match instruction:
                case SendAddRequest(dp_group, message):
                    group = self._groups.get(dp_group)
                    if group is None or not group.link.send(message):
                        refusals.append(SendRefused(message.request_id, message.attempt))
                case SendAbort(dp_group, message):
                    group = self._groups.get(dp_group)
                    if group is None or not group.link.send(message):
                        log.debug("abort not sent", request_id=message.request_id, dp_group=dp_group)
                case _:
                    refusals += self._deliver(instruction)
        return refusals

    def _deliver(self, delivery: Delivery) -> list[Event]:
        entry = self._inboxes.get(delivery.request_id)
        if entry is None:
            return []
        inbox, choice = entry
        if isinstance(delivery, DeliverError | DeliverFinish):
            del self._inboxes[delivery.request_id]
        if inbox.put(choice, delivery):
            return []
        log.warning("client too slow", request_id=delivery.request_id)
        self._inboxes.pop(delivery.request_id, None)
        return [ClientLeft(delivery.request_id)]

    def _set_timer(self) -> None:
        wake_ns = self.core.next_wake_ns()
        if self._timer is not None and wake_ns == self._timer_ns:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wake_ns is not None:
            delay_s = max(0, wake_ns - now_ns()) / NS_PER_S
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)
            self._timer_ns = wake_ns

    def _on_timer(self) -> None:
        self._timer = None
        self._handle(Tick())
