"""The gateway's process: OpenAI's HTTP API in front of the pod.

Life cycle:
    1. read the checkpoint's tokenizer, template and window (no weights); bind the HTTP port; 2. take the
    owner lock and an incarnation; say `Hello` with the base URL; 3. serve HTTP in the same event loop.
    `/health` says 503 until the pod map lists a serving DP group; requests
       that come earlier wait for one, within `gateway.retry_window_ms`;
    4. with every pod map: a DEALER to each new incarnation of a scheduler, and none to a dead one;
    5. on SIGTERM: accept no more requests; give those under way half of `launcher.stop_timeout_ms` to end by
       themselves, then end them with an error that says why; close the server; say `Goodbye`.

Opens: the HTTP socket, a DEALER to the manager, one to each scheduler, one more to the manager for the
counters that `/metrics` shows. No segment, no ROUTER.

If a scheduler dies: its requests go to another DP group, from the tokens that their clients have. If an
attention or expert worker dies: nothing here changes, streams pause. If the manager dies: the last pod
map stays in force. If this process dies: its clients' connections break, and schedulers drop its
requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import uuid
from collections.abc import Generator

import structlog
import uvicorn

from bus import process
from bus.clock import Deadline
from bus.config import GatewayConfig, PodConfig
from bus.control import endpoints, rpc
from bus.control.link import Link
from bus.control.member import Member
from bus.control.messages import GetStatus, PodMap, Status
from bus.control.sockets import Dealer
from bus.errors import RequestTimeout, ResourceError
from bus.garbage import ManagedGc
from gateway import app, checkpoint
from gateway.completions import Api
from gateway.core import JobExecutor
from gateway.dispatcher import Dispatcher, Listener
from gateway.jobs import JobLimits
from gateway.links import scheduler_link
from gateway.metrics import Metrics
from gateway.placer import PlacementSettings

_HEADER_BYTES_MAX = 64 * 1024
_BACKLOG_CONNECTIONS = 2048
_STATUS_TIMEOUT_MS = 300
_STREAM_ENDS_S = 0.5  # for error events to reach their clients
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}

log = structlog.get_logger(__name__)


class HttpServer(uvicorn.Server):
    """uvicorn, but it says when it listens, and leaves signals to the process shell."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = asyncio.Event()
        self.is_stopping = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self.is_listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture nothing."""
        yield


class StatusReader:
    """Asks the manager for the pod map with fresh counters, and makes do with the last map when it is
    away."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._dealer = Dealer(endpoints.manager_endpoint(member.config), b"", Status)
        self._one_at_a_time = asyncio.Lock()

    async def read(self) -> PodMap:
        """Return the manager's status, or the last pod map."""
        async with self._one_at_a_time:
            question = GetStatus(request_id=uuid.uuid4().hex)
            try:
                deadline = Deadline.after_ms(_STATUS_TIMEOUT_MS)
                return (await rpc.request(self._dealer, question, Status, deadline)).pod_map
            except RequestTimeout:
                return self._member.pod_map

    def close(self) -> None:
        """Close the socket."""
        self._dealer.close()


def bind(config: GatewayConfig) -> socket.socket:
    """Return the listening HTTP socket.

    Raises:
        ResourceError: the host is unknown, or the port is in use or forbidden.
    """
    where = f"gateway.port = {config.port} on {config.host}"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise ResourceError(f"{where}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG_CONNECTIONS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ResourceError(f"{where}: {error.strerror}") from None
    return listener


def base_url(config: GatewayConfig, listener: socket.socket) -> str:
    """Return the URL under which this machine reaches the gateway."""
    host = _WILDCARDS.get(config.host, config.host)
    return f"http://{host}:{listener.getsockname()[1]}"


async def run_gateway(config: PodConfig, index: int) -> None:
    """Serve until cancelled."""
    served = await asyncio.to_thread(checkpoint.load, config)
    with contextlib.closing(bind(config.gateway)) as listener:
        core = JobExecutor(job_limits(config), placement_settings(config))
        member = Member(
            config,
            "gateway",
            index,
            http=base_url(config.gateway, listener),
            counters=lambda: {"num_jobs": core.num_jobs(), "num_redispatches": core.counters.redispatches},
        )

        def connect(endpoint: str, listen: Listener) -> Link:
            return scheduler_link(endpoint, member.identity, listen)

        dispatcher = Dispatcher(core, connect)
        member.on_pod_map(dispatcher.take_pod_map)
        status = StatusReader(member)
        server = HttpServer(_uvicorn_config())
        server.config.app = app.build(
            Api(
                config=config.gateway,
                checkpoint=served,
                executor=dispatcher,
                core=core,
                metrics=Metrics(served.name),
                pod_map=lambda: member.pod_map,
                fresh_status=status.read,
                is_stopping=lambda: server.is_stopping,
            )
        )
        try:
            async with member:
                await _serve(server, listener, member, dispatcher)
        finally:
            dispatcher.close()
            status.close()


def job_limits(config: PodConfig) -> JobLimits:
    """Return the job executor's bounds."""
    return JobLimits(
        retry_attempts_max=config.gateway.retry_attempts_max,
        retry_window_ms=config.gateway.retry_window_ms,
        waiting_jobs_max=config.scheduler.max_waiting_requests * config.topology.dp_groups,
    )


def placement_settings(config: PodConfig) -> PlacementSettings:
    """Return what placing needs to know."""
    gateway, topology = config.gateway, config.topology
    is_split = topology.long_dp_groups > 0
    kept_tokens = config.kv.cache_tokens + config.kv.host_tokens
    return PlacementSettings(
        policy=gateway.policy,
        output_reserve_tokens=gateway.output_reserve_tokens,
        balance_tokens=config.kv.cache_tokens * gateway.balance_percent // 100,
        prefix_percent_min=gateway.prefix_percent_min,
        max_num_seqs=config.scheduler.max_num_seqs,
        block_tokens=config.kv.block_tokens,
        cache_tokens=kept_tokens if config.scheduler.enable_prefix_caching else 0,
        first_long_group=topology.dp_groups - topology.long_dp_groups,
        long_tokens=gateway.long_tokens if is_split else sys.maxsize,
    )


def _uvicorn_config() -> uvicorn.Config:
    return uvicorn.Config(
        app="",  # set when it exists
        http="h11",  # slower than httptools, but it bounds what a client may send before its request is complete
        h11_max_incomplete_event_size=_HEADER_BYTES_MAX,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=1,
        backlog=_BACKLOG_CONNECTIONS,
    )


async def _serve(server: HttpServer, listener: socket.socket, member: Member, dispatcher: Dispatcher) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    garbage = ManagedGc(member.config.runtime.gc)
    collecting = asyncio.create_task(garbage.watch(lambda: dispatcher.is_idle))
    try:
        await server.is_listening.wait()
        garbage.take_over()
        member.set_state("ready")
        log.info("serving HTTP", url=member.http)
        await asyncio.shield(serving)
    finally:
        collecting.cancel()
        server.is_stopping = True
        member.set_state("stopping")
        await _drain(dispatcher, member.config.launcher.stop_timeout_ms / 2 / 1000)
        server.should_exit = True
        await serving


async def _drain(dispatcher: Dispatcher, timeout_s: float) -> None:
    """Let requests end by themselves; end the others when time is up."""
    try:
        async with asyncio.timeout(timeout_s):
            await dispatcher.wait_idle()
    except TimeoutError:
        dispatcher.end_all(503, "stopping", "the gateway is stopping")
        await asyncio.sleep(_STREAM_ENDS_S)


def main() -> None:
    """Run a gateway process."""
    process.run(run_gateway, "gateway")


if __name__ == "__main__":
    main()
