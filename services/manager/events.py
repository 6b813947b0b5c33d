"""What the manager's core hears (events) and what it asks for (instructions); nothing else passes."""

from __future__ import annotations

from dataclasses import dataclass, field

from bus.control import messages

# --------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class MemberHello:
    """A member greets; `peer` is where it can be answered."""

    peer: bytes
    hello: messages.Hello
    now_ns: int


@dataclass(frozen=True, slots=True)
class MemberBeat:
    """A member's heartbeat."""

    peer: bytes
    beat: messages.Heartbeat
    now_ns: int


@dataclass(frozen=True, slots=True)
class MemberGoodbye:
    """A member stops cleanly. Its death is still to be seen by its lock."""

    goodbye: messages.Goodbye
    now_ns: int


@dataclass(frozen=True, slots=True)
class LockHeld:
    """The owner lock is held, and its file says by whom. The file may still show the owner before."""

    service: messages.ServiceName
    index: int
    incarnation: int
    pid: int
    now_ns: int


@dataclass(frozen=True, slots=True)
class LockFree:
    """Nobody holds the owner lock; `incarnation` was its last owner (0 = there never was one)."""

    service: messages.ServiceName
    index: int
    incarnation: int
    now_ns: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes. Comes after every round of lock events."""

    now_ns: int


Event = MemberHello | MemberBeat | MemberGoodbye | LockHeld | LockFree | Tick

# --------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class SendWelcome:
    """Accept the peer; tell it the map."""

    peer: bytes
    pod_map: messages.PodMap


@dataclass(frozen=True, slots=True)
class SendRefused:
    """Turn the peer away; it will exit."""

    peer: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class AskIdentity:
    """The peer is unknown here: ask it for `Hello`."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class Publish:
    """Send the map to these peers."""

    peers: tuple[bytes, ...]
    pod_map: messages.PodMap


@dataclass(frozen=True, slots=True)
class KillHung:
    """The member lives but was silent for too long: SIGKILL its process, if that still owns the lock."""

    service: messages.ServiceName
    index: int
    incarnation: int
    pid: int
    silent_ms: int


@dataclass(frozen=True, slots=True)
class Log:
    """Something that people may want to know."""

    event: str
    fields: dict[str, object] = field(default_factory=dict)


Instruction = SendWelcome | SendRefused | AskIdentity | Publish | KillHung | Log
