"""A process's membership in its pod: what every role shares.

Life cycle:
    1. construction takes the owner lock, and with it the next incarnation number: names of sockets and
       segments can be derived now (`socket_endpoint`, `segment_name`), and `endpoint`, `segment`, `http` set;
    2. `start` connects to the manager and says `Hello` until it is welcomed; nothing waits for that, so roles
       start in any order and without a manager;
    3. every heartbeat interval the same event loop looks whether there is news (state, counters, detail,
       epoch); if so, or if the last heartbeat is a few intervals old, it sends one, as long as `vouch`
       vouches for the hot loop;
    4. newer pod maps are kept; listeners hear of them. When the manager dies, the last map stays in force,
       the socket reconnects to the next manager, which asks for `Hello` again;
    5. `Refused` ends the process (exit code 4);
    6. `stop` says `Goodbye` and gives the lock back.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Self, get_args

import structlog

from bus import logs
from bus.clock import NS_PER_MS, Deadline, now_ns
from bus.config import PodConfig, config_sha
from bus.control import endpoints, messages
from bus.control.lock import OwnerLock, is_locked
from bus.control.podmap import PodMapHolder, Predicate, find
from bus.control.sockets import Dealer
from bus.shutdown import EXIT_FAILURE, EXIT_REFUSED, current_shutdown

_GOODBYE_LINGER_MS = 200
_KEEPALIVE_INTERVALS = 4
_HELLO_RETRY_S = 0.02  # until the socket to the manager is connected

_FROM_MANAGER = messages.Welcome | messages.Refused | messages.IdentifyYourself | messages.PodMapPublished

log = structlog.get_logger(__name__)


class Member:
    """This process as a member of the pod. Event loop only, but for the attributes `counters` reads.

    Args:
        config: the pod's settings; creates the runtime folder if needed.
        service: a service name of `messages.ServiceName`.
        index: which one of that service.
        endpoint, segment, http: what peers need to reach this incarnation; may also be set later; they travel
            with the next news, e.g. `set_state("ready")`.
        counters: returns the work counted so far; asked at every heartbeat.
        vouch: False holds heartbeats back; for roles whose work runs in another thread.

    Raises:
        ResourceError: this member is already running, or the runtime folder cannot be used.
    """

    def __init__(
        self,
        config: PodConfig,
        service: str,
        index: int,
        *,
        endpoint: str = "",
        segment: str = "",
        http: str = "",
        counters: Callable[[], dict[str, int]] = dict,
        vouch: Callable[[], bool] = lambda: True,
    ) -> None:
        if service not in get_args(messages.ServiceName):
            raise ValueError(f"service = {service!r}: must be one of {get_args(messages.ServiceName)}")
        endpoints.ensure_runtime_dir(config)
        self._lock = OwnerLock.acquire(endpoints.lock_path(config, service, index))
        self.config = config
        self.service = service
        self.index = index
        self.incarnation = self._lock.incarnation
        self.endpoint = endpoint
        self.segment = segment
        self.http = http
        self.counters = counters
        self.vouch = vouch
        self.state: messages.MemberState = "starting"
        self.detail = ""
        self.refusal = ""
        self._maps = PodMapHolder(config.pod)
        self._dealer: Dealer | None = None
        self._welcomed = asyncio.Event()
        self._announced = ("", "", "")  # endpoint, segment, http as the manager knows them
        self._last_beat: messages.Heartbeat | None = None
        self._next_keepalive_ns = 0
        self._keepalive_ns = _keepalive_ms(config) * NS_PER_MS
        self._tasks: list[asyncio.Task[None]] = []
        logs.bind(incarnation=self.incarnation)

    # ------------------------------------------------------------------ names

    @property
    def name(self) -> str:
        """E.g. `expert-2`."""
        return endpoints.member_name(self.service, self.index)

    @property
    def identity(self) -> bytes:
        """The ZeroMQ identity of this incarnation, for DEALERs to any peer."""
        return f"{self.name}.{self.incarnation}".encode()

    @property
    def socket_endpoint(self) -> str:
        """The address to bind, if this member serves one."""
        return endpoints.member_endpoint(self.config, self.service, self.index, self.incarnation)

    @property
    def segment_name(self) -> str:
        """The POSIX name of this incarnation's segment, if it has one."""
        return endpoints.segment_name(self.config, self.service, self.index, self.incarnation)

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Begin to greet the manager and to send heartbeats. Returns at once."""
        self._dealer = Dealer(endpoints.manager_endpoint(self.config), self.identity, _FROM_MANAGER)
        self._tasks = [self._spawn(self._receive(self._dealer)), self._spawn(self._beat(self._dealer))]

    async def stop(self) -> None:
        """Say `Goodbye`, end the tasks, close the socket, give the lock back. Safe to call twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._dealer is not None:
            self.state = "stopping"
            self._dealer.send(
                messages.Goodbye(service=self._service_name, index=self.index, incarnation=self.incarnation)
            )
            self._dealer.close(linger_ms=_GOODBYE_LINGER_MS)
            self._dealer = None
        self._lock.release()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.stop()

    def set_state(self, state: messages.MemberState, detail: str = "") -> None:
        """Change the state and the line for people, and tell the manager at once."""
        self.state = state
        self.detail = detail
        self._send_news()

    def set_detail(self, detail: str) -> None:
        """Change the line for people, e.g. "loading weights 3/8"; it travels with the next heartbeat."""
        self.detail = detail

    # ------------------------------------------------------------------ the pod

    @property
    def pod_map(self) -> messages.PodMap:
        """The newest map seen; epoch 0 before the first."""
        return self._maps.current

    def on_pod_map(self, listener: Callable[[messages.PodMap], None]) -> None:
        """Call `listener` with every newer map. It must not block; an exception in it ends the process."""
        self._maps.listen(listener)

    async def wait_for(self, predicate: Predicate, deadline: Deadline) -> messages.PodMap:
        """Return the first map that satisfies `predicate`; `RequestTimeout` if none does until `deadline`."""
        return await self._maps.wait_for(predicate, deadline)

    async def wait_welcomed(self) -> None:
        """Return when the manager has accepted this incarnation."""
        await self._welcomed.wait()

    def lookup(self, service: str, index: int) -> messages.Member | None:
        """Return the map's entry of a member, dead or alive; None when it has none."""
        return find(self._maps.current, service, index)

    def peer_alive(self, service: str, index: int) -> bool:
        """Tell whether some incarnation of a member lives now: its owner lock is held. Needs no manager."""
        return is_locked(endpoints.lock_path(self.config, service, index))

    # ------------------------------------------------------------------ inside

    @property
    def _service_name(self) -> messages.ServiceName:
        name: messages.ServiceName = self.service  # type: ignore[assignment]  # checked at construction
        return name

    def _hello(self) -> messages.Hello:
        return messages.Hello(
            pod=self.config.pod,
            service=self._service_name,
            index=self.index,
            incarnation=self.incarnation,
            pid=os.getpid(),
            config_sha=config_sha(self.config),
            state=self.state,
            endpoint=self.endpoint,
            segment=self.segment,
            http=self.http,
        )

    def _send_hello(self, dealer: Dealer) -> bool:
        hello = self._hello()
        sent = dealer.send(hello)
        if sent:
            self._announced = (hello.endpoint, hello.segment, hello.http)
        return sent

    def _send_news(self) -> None:
        if self._dealer is None or not self._welcomed.is_set():
            return  # the first `Hello` is still to come, and carries everything
        if self._announced != (self.endpoint, self.segment, self.http):
            self._send_hello(self._dealer)
        self._last_beat = self._heartbeat()
        self._dealer.send(self._last_beat)
        self._next_keepalive_ns = now_ns() + self._keepalive_ns

    def _heartbeat(self) -> messages.Heartbeat:
        return messages.Heartbeat(
            service=self._service_name,
            index=self.index,
            incarnation=self.incarnation,
            state=self.state,
            counters=self.counters(),
            detail=self.detail,
            epoch=self.pod_map.epoch,
        )

    def _has_news(self) -> bool:
        addresses = (self.endpoint, self.segment, self.http)
        return self._announced != addresses or self._heartbeat() != self._last_beat

    async def _beat(self, dealer: Dealer) -> None:
        interval_s = self.config.heartbeat.interval_ms / 1000
        while True:
            connected = True
            if not self._welcomed.is_set():
                connected = self._send_hello(dealer)
            elif not self.vouch():
                log.warning("heartbeat held back: the hot loop does not turn")
            elif self._has_news() or now_ns() >= self._next_keepalive_ns:
                self._send_news()
            await asyncio.sleep(interval_s if connected else _HELLO_RETRY_S)

    async def _receive(self, dealer: Dealer) -> None:
        while True:
            match await dealer.recv():
                case messages.Welcome(pod_map=pod_map):
                    self._welcomed.set()
                    self._maps.offer(pod_map)
                    self._send_news()  # the state may have changed since `Hello`
                case messages.PodMapPublished(pod_map=pod_map):
                    self._maps.offer(pod_map)
                case messages.IdentifyYourself():
                    self._send_hello(dealer)
                case messages.Refused(reason=reason):
                    self._refused(reason)

    def _refused(self, reason: str) -> None:
        self.refusal = reason
        log.error("refused by the manager", reason=reason)
        shutdown = current_shutdown.get()
        if shutdown is not None:
            shutdown.request(EXIT_REFUSED, f"refused by the manager: {reason}")

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        task.add_done_callback(_end_process_on_failure)
        return task


def _keepalive_ms(config: PodConfig) -> int:
    """Return how long a member without news may be silent; well under the hang timeout."""
    beat = config.heartbeat
    return max(beat.interval_ms, min(_KEEPALIVE_INTERVALS * beat.interval_ms, beat.hang_timeout_ms // 4))


def _end_process_on_failure(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is None:
        return
    log.error("membership failed", exc_info=error)
    shutdown = current_shutdown.get()
    if shutdown is not None:
        shutdown.request(EXIT_FAILURE, f"membership failed: {error!r}")
