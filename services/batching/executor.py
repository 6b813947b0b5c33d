"""The executor (the DP group's attention worker) as its scheduler sees it, and the step it is busy with.

    absent      nobody has connected yet, or the last one is lost
    connected   it has an empty KV cache and computes one step at a time; it may have the next one already
    stalled     its step is overdue, or its connection broke: lost, but the same incarnation comes back by
                saying anything at all; a late result shows that it is idle again

A dead incarnation never comes back, whatever may still be in the sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

from bus.control.messages import ExecutorReady, StepCompleted, StepFailed
from services.batching.batch import ScheduledRequest


@dataclass(frozen=True, slots=True)
class OutstandingStep:
    """A plan that has been sent and not been answered."""

    step_id: int
    deadline_ns: int
    scheduled: list[ScheduledRequest]
    moves_tiers: bool = False  # it stores or loads blocks that count as being there already


class Executor:
    """Which incarnation is connected, which may come back, and what is outstanding."""

    def __init__(self, *, now_ns: int) -> None:
        self.connected: ExecutorReady | None = None
        self.stalled: ExecutorReady | None = None
        self.step: OutstandingStep | None = None
        self.step_ahead: OutstandingStep | None = None  # the one after it, if that has been sent already
        self.absent_since_ns = now_ns
        self._last_dead_incarnation = 0

    def is_news(self, ready: ExecutorReady) -> bool:
        """Tell whether `ready` begins a session; False for a repetition and for the dead."""
        if ready.incarnation <= self._last_dead_incarnation:
            return False
        return self.connected is None or ready.incarnation > self.connected.incarnation

    def connect(self, ready: ExecutorReady) -> None:
        """Begin a session. Two incarnations of one member never live at once: all earlier ones are dead."""
        assert self.connected is None and self.step is None
        self._last_dead_incarnation = max(self._last_dead_incarnation, ready.incarnation - 1)
        self.connected, self.stalled = ready, None

    def bury(self, incarnation: int) -> None:
        """Note that this incarnation, and so every earlier one, has ended."""
        self._last_dead_incarnation = max(self._last_dead_incarnation, incarnation)
        if self.stalled is not None and self.stalled.incarnation <= incarnation:
            self.stalled = None

    def disconnect(self, *, may_return: bool, now_ns: int) -> OutstandingStep | None:
        """End the session and return the step that was under way, the first if there were two."""
        if may_return:
            self.stalled = self.connected
        step, self.connected, self.step, self.step_ahead = self.step, None, None, None
        self.absent_since_ns = now_ns
        return step

    def is_back(self, result: StepCompleted | StepFailed) -> bool:
        """Tell whether a stalled executor has just finished what it was busy with."""
        return self.stalled is not None and result.incarnation == self.stalled.incarnation

    def take_step(self, result: StepCompleted | StepFailed) -> OutstandingStep | None:
        """Return the outstanding step if `result` answers it (then it is over), otherwise None."""
        step = self.step
        if step is None or self.connected is None:
            return None
        if (result.step_id, result.incarnation) != (step.step_id, self.connected.incarnation):
            return None
        self.step, self.step_ahead = self.step_ahead, None
        return step

    def check_invariants(self) -> None:
        """Assert that connected and stalled exclude each other and that only a connected one has a step."""
        assert self.connected is None or self.stalled is None
        assert self.step is None or self.connected is not None, "a step without an executor"
        assert self.step_ahead is None or self.step is not None, "a step ahead of nothing"
        assert self.connected is None or self.connected.incarnation > self._last_dead_incarnation
