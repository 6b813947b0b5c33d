"""A scheduler's process: the DP master of one DP group.

Life cycle:
    1. take the owner lock and an incarnation; bind the ROUTER whose name carries it; say `Hello`;
    2. say ready at once: requests may queue before there is an attention worker;
    3. the attention worker of the group connects (`ExecutorReady`), gateways send requests; one step is under
       way at a time, and its tokens go straight to the gateways;
    4. every `heartbeat.lock_poll_interval_ms`, and whenever the pod map changes, look at the owner locks of
       the attention worker and of every gateway that has requests here, and at the deadlines;
    5. on SIGTERM: close the ROUTER, say `Goodbye`. Gateways dispatch what was running again.

Opens: its ROUTER (DEALERs of gateways `gateway-<i>.<incarnation>` and of the attention worker
`attention-<index>.<incarnation>`), a DEALER to the manager, one to the prefill leader where there is one. No segment.

If the attention worker dies or stalls: its requests wait and are computed again by whoever connects next. If
a gateway dies, or cannot be reached: its requests end. If an expert worker dies: the attention worker copes.
If the prefill leader dies: what it had is computed here, or by its next incarnation. If the manager dies: nothing here
changes. If this process dies: the gateways dispatch its requests again.
"""

from __future__ import annotations

import structlog

from bus import process
from bus.clock import NS_PER_MS, NS_PER_S, now_ns
from bus.config import PodConfig, config_sha
from bus.control.member import Member
from bus.control.messages import (
    AbortRequest,
    AddRequest,
    ExecutorReady,
    KvFetched,
    Message,
    PodMap,
    RequestFailed,
    StepCompleted,
    StepFailed,
)
from bus.control.sockets import Router
from bus.errors import ConfigError, ProtocolError
from services.batching.admission import Limits
from services.core_process import CoreProcess
from services.peers import Peer, has_ended
from services.scheduler.core import SchedulerCore
from services.scheduler.events import (
    Event,
    ExecutorConnected,
    ExecutorLost,
    FromGateway,
    GatewayLost,
    Instruction,
    Reply,
    SendPlan,
    SendToLeader,
    SendTransfer,
    Tick,
    ToGateway,
)
from services.scheduler.leader import PrefillLeader
from services.scheduler.settings import CoreSettings

RECONNECT_NS = NS_PER_S  # how long to leave a living attention worker alone that could not be reached

_FROM_PEERS = AddRequest | AbortRequest | ExecutorReady | StepCompleted | StepFailed | KvFetched

log = structlog.get_logger(__name__)


def core_settings(config: PodConfig, incarnation: int) -> CoreSettings:
    """Return what the core needs of the configuration."""
    num_blocks = config.kv.cache_tokens // config.kv.block_tokens
    return CoreSettings(
        incarnation=incarnation,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_waiting_requests=config.scheduler.max_waiting_requests,
        limits=Limits(
            cache_tokens=num_blocks * config.kv.block_tokens, max_model_len=config.scheduler.max_model_len
        ),
        # A step waits for a dead expert's next incarnation; beyond that, only a stall explains its silence.
        step_timeout_ns=(config.xccl.peer_wait_timeout_ms + config.xccl.stall_timeout_ms) * NS_PER_MS,
        executor_wait_ns=config.xccl.peer_wait_timeout_ms * NS_PER_MS,
        enable_prefix_caching=config.scheduler.enable_prefix_caching,
        async_scheduling=config.scheduler.async_scheduling,
        prefill_tokens_min=config.prefill.tokens_min if config.topology.prefill_workers else 0,
        kv_identity=config_sha(config),  # more than needed, and nothing forgotten
    )


class SchedulerProcess(CoreProcess[Event]):
    """Sockets, locks and clock around a `SchedulerCore`. Event loop only."""

    def __init__(self, config: PodConfig, member: Member, router: Router) -> None:
        super().__init__(config, router)
        self.core = SchedulerCore(core_settings(config, member.incarnation), now_ns=now_ns())
        self._index = member.index
        self._leader = PrefillLeader(member.identity, self.post)
        self._reconnect_at_ns = 0  # 0 = nothing to reconnect

    @property
    def is_idle(self) -> bool:
        """See `CoreProcess`."""
        return self.core.is_idle

    def take_pod_map(self, pod_map: PodMap) -> None:
        """Look at whoever the change may concern."""
        self.look_at_locks()
        self._leader.follow(pod_map)

    def close(self) -> None:
        """Close what it opened."""
        self._leader.close()

    def counters(self) -> dict[str, int]:
        """Return what the heartbeat carries."""
        return {**self.core.snapshot(), "num_refused_messages": self.num_refused_messages()}

    # ---------------------------------------------------------------- events

    def event_of(self, peer: Peer, message: Message) -> Event | None:
        """See `CoreProcess`."""
        if isinstance(message, AddRequest | AbortRequest):
            return FromGateway(str(peer), message) if peer.service == "gateway" else None
        if (peer.service, peer.index) != ("attention", self._index):
            return None
        match message:
            case ExecutorReady(incarnation=peer.incarnation):
                return ExecutorConnected(message)
            case (
                StepCompleted(incarnation=peer.incarnation)
                | StepFailed(incarnation=peer.incarnation)
                | KvFetched(incarnation=peer.incarnation)
            ):
                return message
        return None

    def decide(self, events: list[Event]) -> None:
        """See `CoreProcess`."""
        was_idle, connected = self.core.is_idle, self.core.executor.connected
        instructions = self.core.handle(*events, now_ns=now_ns())
        self._log_changes(events, connected)
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
        executor = self.core.executor.connected or self.core.executor.stalled
        if executor is not None:
            peer = Peer("attention", self._index, executor.incarnation)
            if has_ended(self._config, peer):
                self.post(ExecutorLost(executor.incarnation, "its owner lock is free"))
        for gateway in {request.gateway for request in self.core.requests.values()}:
            known = Peer.parse(gateway.encode())
            if known is not None and has_ended(self._config, known):
                self.post(GatewayLost(gateway))

    def _reconnect(self) -> None:
        """Try a living attention worker again that could not be reached: it may not know, so not greet."""
        stalled = self.core.executor.stalled
        if stalled is not None and self._reconnect_at_ns and now_ns() >= self._reconnect_at_ns:
            self._reconnect_at_ns = 0
            self.post(ExecutorConnected(stalled))

    # ---------------------------------------------------------------- instructions

    def _perform(self, instruction: Instruction) -> None:
        match instruction:
            case SendPlan(incarnation, message) | SendTransfer(incarnation, message):
                peer = Peer("attention", self._index, incarnation)
                if not self.send(peer.identity, message):
                    self._reconnect_at_ns = now_ns() + RECONNECT_NS
                    self.post(ExecutorLost(incarnation, "it cannot be reached", dead=False))
            case SendToLeader(message):
                self._leader.send(message)
            case Reply(gateway, message):
                self._reply(gateway, message)

    def _reply(self, gateway: str, message: ToGateway) -> None:
        log.debug(
            "reply",
            kind=type(message).__name__,
            gateway=gateway,
            request_id=message.request_id,
            attempt=message.attempt,
            finish_reason=getattr(message, "finish_reason", ""),
        )
        try:
            reached = self.send(gateway.encode(), message)
        except ProtocolError as error:
            reached = self._give_up(gateway, message, str(error))
        if not reached:
            self.post(GatewayLost(gateway))

    def _give_up(self, gateway: str, message: ToGateway, reason: str) -> bool:
        """A reply cannot be sent as it is (too large): say so instead, and end the request."""
        request_id, attempt = message.request_id, message.attempt
        log.warning("reply cannot be sent", gateway=gateway, request_id=request_id, reason=reason)
        self.post(FromGateway(gateway, AbortRequest(request_id=request_id, attempt=attempt)))
        failed = RequestFailed(request_id=request_id, attempt=attempt, code="too_large", message=reason)
        return self.send(gateway.encode(), failed)

    def _log_changes(self, events: list[Event], before: ExecutorReady | None) -> None:
        after = self.core.executor.connected
        if before is not after:
            reasons = [event.reason for event in events if isinstance(event, ExecutorLost)]
            if after is None:
                overdue = reasons or ["its step is overdue"]
                log.warning(
                    "attention worker lost", incarnation=before and before.incarnation, reason=overdue[0]
                )
            else:
                log.info(
                    "attention worker connected", incarnation=after.incarnation, num_blocks=after.num_blocks
                )
        for event in events:
            match event:
                case FromGateway(gateway, message):
                    kind, request_id = type(message).__name__, message.request_id
                    log.debug(
                        "request", kind=kind, gateway=gateway, request_id=request_id, attempt=message.attempt
                    )
                case GatewayLost(gateway):
                    log.info("gateway lost", gateway=gateway)


async def scheduler_main(config: PodConfig, index: int) -> None:
    """Serve as the scheduler of DP group `index` until cancelled."""
    if index >= config.topology.dp_groups:
        raise ConfigError(
            f"--index = {index}: must be below topology.dp_groups = {config.topology.dp_groups}"
        )
    member = Member(config, "scheduler", index)
    member.endpoint = member.socket_endpoint
    router = Router(member.endpoint, _FROM_PEERS)
    shell = SchedulerProcess(config, member, router)
    try:
        member.counters = shell.counters
        member.on_pod_map(shell.take_pod_map)
        async with member:
            member.set_state("ready")
            log.info("scheduler started", endpoint=member.endpoint)
            await shell.run()
    finally:
        shell.close()
        router.close()


def main() -> None:
    """Entry of `python -P -m services.scheduler.process`."""
    process.run(scheduler_main, "scheduler")


if __name__ == "__main__":
    main()
