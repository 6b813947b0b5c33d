"""The hot loop of an attention worker: a thread of its own, never asyncio (the paper's executor).

It follows its scheduler: whenever the pod map names another incarnation, it closes the old socket and greets the new
one with `ExecutorReady`, repeated until the first plan arrives, since a greeting may be lost with a connection.
Between plans it moves KV, if it has any to move, a slice before each look for the next plan; otherwise it sleeps in
the socket's poll. It beats the segment's heartbeat word, which the control loop vouches for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import structlog

from bus.control.messages import (
    CancelFetch,
    ExecutorReady,
    FetchKv,
    Member,
    Message,
    StepCompleted,
    StepFailed,
    StepPlan,
    WithdrawOffers,
)
from bus.control.sockets import SyncDealer
from bus.garbage import ManagedGc
from bus.memory.segment import Segment
from services.steps.drawn import NothingDrawn
from services.steps.executor import ExpertsAway, StepAbandoned, StepExecutor
from services.steps.transfers import IDLE_POLL_MS, Transfers

SEND_TIMEOUT_MS = 1_000
_FROM_PLANNER = StepPlan | FetchKv | CancelFetch | WithdrawOffers


class HotLoop:
    """Receives step plans, has them executed, answers."""

    def __init__(
        self,
        executor: StepExecutor,
        segment: Segment,
        greeting: ExecutorReady,
        *,
        identity: bytes,
        scheduler: Callable[[], Member | None],
        garbage: ManagedGc,
        transfers: Transfers | None = None,
    ):
        """`scheduler` returns whoever plans for this worker as the newest pod map has it.

        `transfers` belong to this thread, which closes them in the end.
        """
        self._transfers = transfers
        self._garbage = garbage
        self._executor, self._segment, self._greeting = executor, segment, greeting
        self._identity, self._scheduler = identity, scheduler
        self._dealer: SyncDealer | None = None
        self._followed = 0  # incarnation of the scheduler that the socket belongs to
        self._greeted = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hot-loop", daemon=True)
        self._log = structlog.get_logger()
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        executor.experts.wanted = self._wanted

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def waits_for_core(self) -> bool:
        """Tell whether the thread could go on if the machine let it: silence is no hang then."""
        if self._thread.native_id is None:
            return False
        try:
            stat = Path(f"/proc/self/task/{self._thread.native_id}/stat").read_text()
        except OSError:
            return False  # it has ended
        return stat.rpartition(")")[2].split()[0] == "R"

    def stop(self, timeout_s: float) -> None:
        """Ask the thread to end and wait for it."""
        self._stopping.set()
        self._thread.join(timeout_s)

    def _wanted(self) -> bool:
        current = self._scheduler()
        return not self._stopping.is_set() and (current is None or current.incarnation == self._followed)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._segment.beat()
                self._follow_scheduler()
                if self._dealer is None:
                    self._stopping.wait(IDLE_POLL_MS / 1000)
                    continue
                self._turn(self._dealer)
        except BaseException as error:
            self.on_failure(error)
        finally:
            if self._dealer is not None:
                self._dealer.close()
            if self._transfers is not None:
                self._transfers.close()

    def _follow_scheduler(self) -> None:
        current = self._scheduler()
        if current is None or not current.endpoint or current.incarnation == self._followed:
            return
        if self._dealer is not None:
            self._dealer.close()
        if self._transfers is not None:
            self._transfers.reset()
        self._dealer = SyncDealer(current.endpoint, self._identity, _FROM_PLANNER)
        self._followed, self._greeted = current.incarnation, False
        self._log.info("scheduler_followed", incarnation=current.incarnation)

    def _turn(self, dealer: SyncDealer) -> None:
        if not self._greeted:
            dealer.send(self._greeting, timeout_ms=IDLE_POLL_MS)
        poll_ms = self._transfer(dealer)
        message = dealer.recv(poll_ms)
        if message is None and poll_ms == IDLE_POLL_MS:
            self._garbage.idle()
        elif isinstance(message, _FROM_PLANNER) and message.scheduler_incarnation == self._followed:
            self._greeted = True
            if isinstance(message, StepPlan):
                self._send(dealer, self._execute(message))
                self._garbage.turn()
            elif self._transfers is not None:
                self._transfers.handle(message)

    def _transfer(self, dealer: SyncDealer) -> int:
        """Move KV for a bounded time and report; return how many milliseconds to wait for the next message."""
        if self._transfers is None:
            return IDLE_POLL_MS
        poll_ms = self._transfers.progress()
        for message in self._transfers.outgoing():
            self._send(dealer, message)
        return poll_ms

    def _send(self, dealer: SyncDealer, message: Message | None) -> None:
        # A lost answer would leave the scheduler waiting for its step's deadline, or with blocks that are never free.
        while message is not None and self._wanted() and not dealer.send(message, SEND_TIMEOUT_MS):
            self._segment.beat()

    def _execute(self, plan: StepPlan) -> StepCompleted | StepFailed | None:
        incarnation = self._greeting.incarnation
        try:
            return self._executor.run(plan, incarnation)
        except StepAbandoned:
            return None
        except ExpertsAway as error:
            return StepFailed(
                step_id=plan.step_id, incarnation=incarnation, code="experts_away", message=str(error)
            )
        except NothingDrawn as error:
            return StepFailed(
                step_id=plan.step_id, incarnation=incarnation, code="nothing_drawn", message=str(error)
            )
        except ValueError as error:
            self._log.error("bad_plan", error=str(error))
            return StepFailed(
                step_id=plan.step_id, incarnation=incarnation, code="bad_plan", message=str(error)
            )
