"""The members of a pod as the manager lists them: which roles there are, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from bus.clock import NS_PER_MS
from bus.config import PodConfig
from bus.control import messages
from services.manager.events import MemberHello

Key = tuple[messages.ServiceName, int]

MANAGER: Key = ("manager", 0)
STATE_ORDER: dict[messages.MemberState, int] = {"starting": 0, "ready": 1, "stopping": 2, "dead": 3}


@dataclass(slots=True)
class Entry:
    """One role and the newest incarnation seen in it."""

    incarnation: int
    pid: int
    heard_ns: int
    state: messages.MemberState = "starting"
    peer: bytes = b""  # where it can be reached; empty until it has greeted, and when it is dead
    endpoint: str = ""
    segment: str = ""
    http: str = ""
    counters: dict[str, int] = field(default_factory=dict)
    detail: str = ""

    def public(self) -> tuple[object, ...]:
        """Return what a change of makes a new map."""
        return (self.incarnation, self.pid, self.state, self.endpoint, self.segment, self.http)


def expected_members(config: PodConfig) -> tuple[Key, ...]:
    """Return the roles of a pod, in the order in which they start."""
    topology = config.topology
    keys: list[Key] = [MANAGER]
    keys += [("expert", index) for index in range(topology.expert_workers)]
    keys += [("prefill", index) for index in range(topology.prefill_workers)]
    keys += [("attention", index) for index in range(topology.dp_groups)]
    keys += [("shell", 0)] if topology.prefill_workers else []
    keys += [("scheduler", index) for index in range(topology.dp_groups)]
    keys.append(("gateway", 0))
    return tuple(keys)


def later(known: messages.MemberState, told: messages.MemberState) -> messages.MemberState:
    """Return the later of two states; death is never taken from a message."""
    return told if STATE_ORDER[told] > STATE_ORDER[known] and told != "dead" else known


def entry_of(event: MemberHello) -> Entry:
    """Return the entry that a first `Hello` of an incarnation makes."""
    hello = event.hello
    return Entry(
        incarnation=hello.incarnation,
        pid=hello.pid,
        heard_ns=event.now_ns,
        state=later("starting", hello.state),
        peer=event.peer,
        endpoint=hello.endpoint,
        segment=hello.segment,
        http=hello.http,
    )


def member_of(key: Key, entry: Entry, now_ns: int | None) -> messages.Member:
    """Return the entry as the map shows it; heartbeat age 0 when `now_ns` is None."""
    service, index = key
    alive = entry.state != "dead"
    age_ms = max(0, now_ns - entry.heard_ns) // NS_PER_MS if now_ns and alive else 0
    return messages.Member(
        service=service,
        index=index,
        incarnation=entry.incarnation,
        pid=entry.pid,
        state=entry.state,
        endpoint=entry.endpoint,
        segment=entry.segment,
        http=entry.http,
        heartbeat_age_ms=age_ms,
        counters=entry.counters,
        detail=entry.detail,
    )
