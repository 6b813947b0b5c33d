"""What the scheduler's core hears (events) and what it wants done (instructions).

Events are facts. Step results are the wire messages themselves; everything else is wrapped with what the wire
cannot say: who sent it, and which incarnation it is about. Instructions are performed in order by
`process.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bus.control.messages import (
    AbortPrefill,
    AbortRequest,
    AddPrefill,
    AddRequest,
    CancelFetch,
    ExecutorReady,
    FetchKv,
    KvFetched,
    PrefillCompleted,
    PrefillFailed,
    RequestAccepted,
    RequestFailed,
    RequestRejected,
    StepCompleted,
    StepFailed,
    StepPlan,
    TokensGenerated,
)

ToGateway = RequestAccepted | RequestRejected | TokensGenerated | RequestFailed


@dataclass(frozen=True, slots=True)
class FromGateway:
    """A gateway said something. `gateway` names it with its incarnation, for example `gateway-0.7`."""

    gateway: str
    message: AddRequest | AbortRequest


@dataclass(frozen=True, slots=True)
class GatewayLost:
    """A gateway's incarnation has ended; nobody reads what its requests produce."""

    gateway: str


@dataclass(frozen=True, slots=True)
class ExecutorConnected:
    """The attention worker said that it is ready. It says so until the first plan: this may come often."""

    ready: ExecutorReady


@dataclass(frozen=True, slots=True)
class ExecutorLost:
    """The attention worker cannot be relied on any more.

    `dead` = its process has ended: nothing of this incarnation counts from now on. Otherwise only its
    connection was lost, and the same incarnation may connect again.
    """

    incarnation: int
    reason: str
    dead: bool = True


@dataclass(frozen=True, slots=True)
class LeaderFound:
    """A prefill leader can be reached. It knows of no task."""


@dataclass(frozen=True, slots=True)
class LeaderLost:
    """The prefill leader has ended, or cannot be reached: its tasks are gone. Offers of its workers may stand."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; deadlines are looked at."""


Event = (
    FromGateway
    | GatewayLost
    | ExecutorConnected
    | ExecutorLost
    | StepCompleted
    | StepFailed
    | LeaderFound
    | LeaderLost
    | PrefillCompleted
    | PrefillFailed
    | KvFetched
    | Tick
)


@dataclass(frozen=True, slots=True)
class SendPlan:
    """Send a plan to the attention worker of this incarnation."""

    incarnation: int
    message: StepPlan


@dataclass(frozen=True, slots=True)
class Reply:
    """Send `message` to the gateway."""

    gateway: str
    message: ToGateway


@dataclass(frozen=True, slots=True)
class SendTransfer:
    """Send `message` to the attention worker of this incarnation."""

    incarnation: int
    message: FetchKv | CancelFetch


@dataclass(frozen=True, slots=True)
class SendToLeader:
    """Send `message` to the prefill leader."""

    message: AddPrefill | AbortPrefill


Instruction = SendPlan | Reply | SendTransfer | SendToLeader
