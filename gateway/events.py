"""What goes into the job executor (`gateway.core`) and what comes out of it.

Events are facts; instructions are what the shell must do about them. Both are plain frozen values without
behaviour, so a race is two events in the bad order, and a test compares lists of instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bus.control.messages import (
    AbortRequest,
    AddRequest,
    FinishReason,
    RequestAccepted,
    RequestFailed,
    RequestRejected,
    SamplingParams,
    TokenLogprob,
    TokensGenerated,
)

SchedulerMessage = RequestAccepted | RequestRejected | TokensGenerated | RequestFailed


@dataclass(frozen=True, slots=True)
class GroupView:
    """One DP group as the pod map shows it."""

    incarnation: int  # of the group's scheduler
    serving: bool  # scheduler, attention worker and all experts are ready
    executor_incarnation: int = (
        0  # of its attention worker, whose death empties the KV cache; 0 = none was seen
    )


# --------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class ClientSubmitted:
    """A validated request; `request_id` was never used before."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class SchedulerSaid:
    """A message of the scheduler of `dp_group`."""

    dp_group: int
    message: SchedulerMessage


@dataclass(frozen=True, slots=True)
class SendRefused:
    """An `AddRequest` could not be handed to the group's socket (no connection, or its queue is full)."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class GroupsChanged:
    """All DP groups whose scheduler is not known to be dead. A missing group has lost its scheduler."""

    groups: Mapping[int, GroupView]


@dataclass(frozen=True, slots=True)
class ClientLeft:
    """The client went away, or fell too far behind."""

    request_id: str


@dataclass(frozen=True, slots=True)
class StopStringMet:
    """The text holds a stop string: the client has all that it will get."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; sent at or after `JobExecutor.next_wake_ns()`."""


Event = ClientSubmitted | SchedulerSaid | SendRefused | GroupsChanged | ClientLeft | StopStringMet | Tick


# --------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class SendAddRequest:
    """Send to the scheduler of `dp_group`."""

    dp_group: int
    message: AddRequest


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Send to the scheduler of `dp_group`; loss is harmless."""

    dp_group: int
    message: AbortRequest


@dataclass(frozen=True, slots=True)
class DeliverAccepted:
    """A scheduler has queued the request for the first time. At most once, before any tokens."""

    request_id: str


@dataclass(frozen=True, slots=True)
class DeliverTokens:
    """New output tokens, in order, each once. `prompt_logprobs` come once, with the first delivery."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, or empty
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DeliverFinish:
    """The last word about a request that ended well."""

    request_id: str
    reason: FinishReason
    stop_token_id: int = -1


@dataclass(frozen=True, slots=True)
class DeliverError:
    """The last word about a request that ended badly."""

    request_id: str
    status: int  # HTTP
    code: str
    message: str
    retry_after_s: int = 0  # 0 = no advice


Delivery = DeliverAccepted | DeliverTokens | DeliverFinish | DeliverError
Instruction = SendAddRequest | SendAbort | Delivery
