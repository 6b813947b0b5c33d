"""What the TE-shell's core hears (events) and what it wants done (instructions). See `services/scheduler/events.py`."""

from __future__ import annotations

from dataclasses import dataclass

from bus.control.messages import (
    AbortPrefill,
    AddPrefill,
    ExecutorReady,
    OffersEnded,
    PrefillCompleted,
    PrefillFailed,
    StepCompleted,
    StepFailed,
    StepPlan,
    WithdrawOffers,
)


@dataclass(frozen=True, slots=True)
class FromScheduler:
    """A scheduler said something. `scheduler` names it with its incarnation, for example `scheduler-0.7`."""

    scheduler: str
    message: AddPrefill | AbortPrefill


@dataclass(frozen=True, slots=True)
class SchedulerLost:
    """A scheduler's incarnation has ended; nobody wants its prompts."""

    scheduler: str


@dataclass(frozen=True, slots=True)
class WorkerConnected:
    """A prefill worker said that it is ready. It says so until the first plan: this may come often."""

    ready: ExecutorReady


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A prefill worker cannot be relied on any more. `dead`: see `services.scheduler.events.ExecutorLost`."""

    index: int
    incarnation: int
    reason: str
    dead: bool = True


@dataclass(frozen=True, slots=True)
class FromWorker:
    """A prefill worker said something about its step, or about what it offers."""

    index: int
    message: StepCompleted | StepFailed | OffersEnded


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; deadlines are looked at."""


Event = FromScheduler | SchedulerLost | WorkerConnected | WorkerLost | FromWorker | Tick


@dataclass(frozen=True, slots=True)
class ToWorker:
    """Send `message` to the prefill worker of this incarnation."""

    index: int
    incarnation: int
    message: StepPlan | WithdrawOffers


@dataclass(frozen=True, slots=True)
class Reply:
    """Send `message` to the scheduler."""

    scheduler: str
    message: PrefillCompleted | PrefillFailed


Instruction = ToWorker | Reply
