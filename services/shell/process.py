"""The TE-shell's process: leads the prefill workers of the pod.

Life cycle:
    1. take the owner lock and an incarnation; bind a ROUTER of this incarnation's own name;
    2. say ready; the pod map then leads schedulers and prefill workers here, who greet it;
    3. feed messages, locks and time to the core; do what it says;
    4. on SIGTERM close the socket and give the lock back.

Opens: a ROUTER for schedulers and prefill workers; a DEALER to the manager. No segment. If a prefill worker dies,
its prompts are computed by another one, or by its next incarnation. If a scheduler dies, its tasks are forgotten.
If the manager dies, nothing changes here. If this process dies, prefill workers withdraw what they offered to its
tasks and greet the next incarnation; schedulers hand their tasks over again, or compute them themselves.
"""

from __future__ import annotations

import structlog

from bus import process
from bus.clock import NS_PER_MS, NS_PER_S, now_ns
from bus.config import PodConfig, config_sha
from bus.control.member import Member
from bus.control.messages import (
    AbortPrefill,
    AddPrefill,
    ExecutorReady,
    Message,
    OffersEnded,
    PodMap,
    PrefillCompleted,
    PrefillFailed,
    StepCompleted,
    StepFailed,
)
from bus.control.sockets import Router
from bus.errors import ConfigError, ProtocolError
from services.batching.admission import Limits
from services.core_process import CoreProcess
from services.peers import Peer, has_ended
from services.shell.core import ShellCore
from services.shell.events import (
    Event,
    FromScheduler,
    FromWorker,
    Instruction,
    Reply,
    SchedulerLost,
    Tick,
    ToWorker,
    WorkerConnected,
    WorkerLost,
)
from services.shell.policies import POLICIES
from services.shell.settings import ShellSettings
from services.shell.tasks import Worker

RECONNECT_NS = NS_PER_S  # how long to leave a living prefill worker alone that could not be reached

_FROM_PEERS = AddPrefill | AbortPrefill | ExecutorReady | StepCompleted | StepFailed | OffersEnded

log = structlog.get_logger(__name__)


def shell_settings(config: PodConfig, incarnation: int) -> ShellSettings:
    """Return what the core needs of the configuration. Raises ConfigError."""
    prefill, xccl = config.prefill, config.xccl
    if prefill.policy not in POLICIES:
        rule = f"must be one of {', '.join(POLICIES)}"
        raise ConfigError(f"prefill.policy = {prefill.policy!r}: {rule}")
    return ShellSettings(
        incarnation=incarnation,
        num_workers=config.topology.prefill_workers,
        long_workers=prefill.long_workers,
        long_tokens=prefill.long_tokens,
        policy=POLICIES[prefill.policy],
        max_num_seqs=prefill.max_num_seqs,
        max_num_batched_tokens=prefill.max_num_batched_tokens,
        max_waiting_tasks=prefill.max_waiting_tasks,
        enable_prefix_caching=config.scheduler.enable_prefix_caching,
        enable_chunked_prefill=prefill.enable_chunked_prefill,
        expert_parallel=prefill.expert_parallel,
        limits=Limits(cache_tokens=prefill.cache_tokens, max_model_len=config.scheduler.max_model_len),
        step_timeout_ns=(xccl.peer_wait_timeout_ms + xccl.stall_timeout_ms) * NS_PER_MS,
        worker_wait_ns=xccl.peer_wait_timeout_ms * NS_PER_MS,
        kv_identity=config_sha(config),  # more than needed, and nothing forgotten
    )


class ShellProcess(CoreProcess[Event]):
    """Socket, locks and clock around a `ShellCore`. Event loop only."""

    def __init__(self, config: PodConfig, member: Member, router: Router) -> None:
        super().__init__(config, router)
        self.core = ShellCore(shell_settings(config, member.incarnation), now_ns=now_ns())
        self._reconnect_at_ns: dict[int, int] = {}  # by worker

    @property
    def is_idle(self) -> bool:
        """See `CoreProcess`."""
        return self.core.is_idle

    def counters(self) -> dict[str, int]:
        """Return what the heartbeat carries."""
        return {**self.core.snapshot(), "num_refused_messages": self.num_refused_messages()}

    def take_pod_map(self, _: PodMap) -> None:
        """Look at whoever the change may concern."""
        self.look_at_locks()

    # ---------------------------------------------------------------- events

    def event_of(self, peer: Peer, message: Message) -> Event | None:
        """See `CoreProcess`."""
        match message:
            case AddPrefill() | AbortPrefill():
                is_known = peer.service == "scheduler" and peer.index < self._config.topology.dp_groups
                return FromScheduler(str(peer), message) if is_known else None
            case _ if peer.service != "prefill" or peer.index >= self._config.topology.prefill_workers:
                return None
            case ExecutorReady(index=peer.index, incarnation=peer.incarnation):
                return WorkerConnected(message)
            case (
                StepCompleted(incarnation=peer.incarnation)
                | StepFailed(incarnation=peer.incarnation)
                | OffersEnded(incarnation=peer.incarnation)
            ):
                return FromWorker(peer.index, message)
        return None

    def decide(self, events: list[Event]) -> None:
        """See `CoreProcess`."""
        was_idle = self.core.is_idle
        before = [worker.executor.connected for worker in self.core.workers]
        instructions = self.core.handle(*events, now_ns=now_ns())
        self._log_changes(events, before)
        for instruction in instructions:
            self._perform(instruction)
        if self.core.is_idle and not was_idle:
            self.core.check_invariants()

    def watch(self) -> None:
        """See `CoreProcess`."""
        self.look_at_locks()
        self._reconnect()
        self.post(Tick())

    def look_at_locks(self) -> None:
        """Post the death of every peer that matters here and whose incarnation has ended."""
        for worker in self.core.workers:
            ready = worker.executor.connected or worker.executor.stalled
            if ready is not None and has_ended(
                self._config, Peer("prefill", worker.index, ready.incarnation)
            ):
                self.post(WorkerLost(worker.index, ready.incarnation, "its owner lock is free"))
        for scheduler in self.core.schedulers:
            known = Peer.parse(scheduler.encode())
            if known is not None and has_ended(self._config, known):
                self.post(SchedulerLost(scheduler))

    def _reconnect(self) -> None:
        """Try living prefill workers again that could not be reached: they may not know, so not greet."""
        for index, at_ns in list(self._reconnect_at_ns.items()):
            if now_ns() < at_ns:
                continue
            del self._reconnect_at_ns[index]
            stalled = self.core.workers[index].executor.stalled
            if stalled is not None:
                self.post(WorkerConnected(stalled))

    # ---------------------------------------------------------------- instructions

    def _perform(self, instruction: Instruction) -> None:
        match instruction:
            case ToWorker(index, incarnation, message):
                if not self.send(Peer("prefill", index, incarnation).identity, message):
                    self._reconnect_at_ns[index] = now_ns() + RECONNECT_NS
                    self.post(WorkerLost(index, incarnation, "it cannot be reached", dead=False))
            case Reply(scheduler, message):
                self._reply(scheduler, message)

    def _reply(self, scheduler: str, message: PrefillCompleted | PrefillFailed) -> None:
        log.debug("reply", kind=type(message).__name__, scheduler=scheduler, task_id=message.task_id)
        try:
            reached = self.send(scheduler.encode(), message)
        except ProtocolError as error:
            reached = self._give_up(scheduler, message.task_id, str(error))
        if not reached:
            self.post(SchedulerLost(scheduler))

    def _give_up(self, scheduler: str, task_id: int, reason: str) -> bool:
        """A reply cannot be sent as it is (too large): say so instead, and end the task."""
        log.warning("reply cannot be sent", scheduler=scheduler, task_id=task_id, reason=reason)
        self.post(FromScheduler(scheduler, AbortPrefill(task_id=task_id)))
        failed = PrefillFailed(task_id=task_id, code="too_large", message=reason, retryable=False)
        return self.send(scheduler.encode(), failed)

    def _log_changes(self, events: list[Event], before: list[ExecutorReady | None]) -> None:
        for worker, was in zip(self.core.workers, before, strict=True):
            if worker.executor.connected is not was:
                _log_worker(worker, was, events)
        for event in events:
            if isinstance(event, SchedulerLost):
                log.info("scheduler lost", scheduler=event.scheduler)


def _log_worker(worker: Worker, was: ExecutorReady | None, events: list[Event]) -> None:
    now = worker.executor.connected
    if now is not None:
        log.info("prefill worker connected", index=worker.index, incarnation=now.incarnation)
        return
    reasons = [one.reason for one in events if isinstance(one, WorkerLost) and one.index == worker.index]
    reason = [*reasons, "its step is overdue"][0]
    log.warning("prefill worker lost", index=worker.index, incarnation=was and was.incarnation, reason=reason)


async def shell_main(config: PodConfig, index: int) -> None:
    """Serve as the TE-shell of the pod's prefill workers until cancelled; there is only one."""
    if index != 0 or not config.topology.prefill_workers:
        raise ConfigError(
            f"--index = {index}: there is one shell, shell-0, and only in a pod with topology.prefill_workers > 0"
        )
    member = Member(config, "shell", index)
    member.endpoint = member.socket_endpoint
    router = Router(member.endpoint, _FROM_PEERS)
    try:
        shell = ShellProcess(config, member, router)
        member.counters = shell.counters
        member.on_pod_map(shell.take_pod_map)
        async with member:
            member.set_state("ready")
            log.info("shell started", endpoint=member.endpoint)
            await shell.run()
    finally:
        router.close()


def main() -> None:
    """Entry of `python -P -m services.shell.process`."""
    process.run(shell_main, "shell")


if __name__ == "__main__":
    main()
