"""The manager's process: keeps the pod map.

Life cycle:
    1. take the owner lock `manager-0` and with it the incarnation that makes this manager's epochs newer than
       all before;
    2. bind `manager.sock` (ROUTER);
    3. look at every owner lock each `heartbeat.lock_poll_interval_ms`; a death is thus noticed without any
       message;
    4. feed messages, locks and time to the core; do what it says;
    5. on SIGTERM close the socket and give the lock back. Members keep their last map.

Opens: `manager.sock`. No segment. If a member dies: its lock tells, the map says `dead`, the launcher starts
the next incarnation. If the manager dies: nothing stops; the launcher starts the next one, which rebuilds the
map.
"""

from __future__ import annotations

import asyncio
import os
import signal

import structlog

from bus import logs, process
from bus.clock import now_ns
from bus.config import PodConfig
from bus.control import endpoints, messages
from bus.control.lock import LockWatch, OwnerLock, signal_owner
from bus.control.sockets import QueueFull, Router
from bus.errors import ConfigError, ResourceError
from services.manager.core import ManagerCore
from services.manager.events import (
    AskIdentity,
    Event,
    Instruction,
    KillHung,
    LockFree,
    LockHeld,
    Log,
    MemberBeat,
    MemberGoodbye,
    MemberHello,
    Publish,
    SendRefused,
    SendWelcome,
    Tick,
)
from services.manager.roster import MANAGER, Key, expected_members

_FROM_MEMBERS = messages.Hello | messages.Heartbeat | messages.Goodbye | messages.GetStatus

log = structlog.get_logger(__name__)


class ManagerProcess:
    """Socket, locks and clock around a `ManagerCore`."""

    def __init__(self, config: PodConfig) -> None:
        endpoints.ensure_runtime_dir(config)
        self._config = config
        self._lock = OwnerLock.acquire(endpoints.lock_path(config, *MANAGER))
        logs.bind(incarnation=self._lock.incarnation)
        self._router = Router(endpoints.manager_endpoint(config), _FROM_MEMBERS)
        self._core = ManagerCore(config, incarnation=self._lock.incarnation, pid=os.getpid(), now_ns=now_ns())
        self._watched = {
            key: LockWatch(endpoints.lock_path(config, *key))
            for key in expected_members(config)
            if key != MANAGER
        }

    async def run(self) -> None:
        """Serve until cancelled."""
        log.info("manager started", pid=os.getpid())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._serve())
                group.create_task(self._watch_locks())
        finally:
            self._router.close()
            for watch in self._watched.values():
                watch.close()
            self._lock.release()

    async def _serve(self) -> None:
        while True:
            peer, message = await self._router.recv()
            match message:
                case messages.Hello():
                    self._handle(MemberHello(peer, message, now_ns()))
                case messages.Heartbeat():
                    self._handle(MemberBeat(peer, message, now_ns()))
                case messages.Goodbye():
                    self._handle(MemberGoodbye(message, now_ns()))
                case messages.GetStatus():
                    status = self._core.status(now_ns())
                    self._send(peer, messages.Status(request_id=message.request_id, pod_map=status))

    async def _watch_locks(self) -> None:
        interval_s = self._config.heartbeat.lock_poll_interval_ms / 1000
        while True:
            for key, watch in self._watched.items():
                self._look_at_lock(key, watch)
            self._handle(Tick(now_ns()))
            await asyncio.sleep(interval_s)

    def _look_at_lock(self, key: Key, watch: LockWatch) -> None:
        service, index = key
        try:
            held, owner = watch.look()
        except ResourceError as error:
            log.error("lock file unreadable", error=str(error))
            return
        if held and owner is not None:
            self._handle(LockHeld(service, index, owner.incarnation, owner.pid, now_ns()))
        elif not held:
            self._handle(LockFree(service, index, owner.incarnation if owner else 0, now_ns()))

    def _handle(self, event: Event) -> None:
        for instruction in self._core.handle(event):
            self._perform(instruction)

    def _perform(self, instruction: Instruction) -> None:
        match instruction:
            case SendWelcome(peer, pod_map):
                self._send(peer, messages.Welcome(pod_map=pod_map))
            case SendRefused(peer, reason):
                self._send(peer, messages.Refused(reason=reason))
            case AskIdentity(peer):
                self._send(peer, messages.IdentifyYourself())
            case Publish(peers, pod_map):
                for peer in peers:
                    self._send(peer, messages.PodMapPublished(pod_map=pod_map))
            case KillHung():
                self._kill(instruction)
            case Log(event, fields):
                log.info(event, **fields)

    def _send(self, peer: bytes, message: messages.Message) -> None:
        try:
            self._router.send(peer, message)
        except QueueFull as error:  # its heartbeat will show the older epoch, and it is sent the map again
            log.warning("not sent", error=str(error))

    def _kill(self, hung: KillHung) -> None:
        name = endpoints.member_name(hung.service, hung.index)
        path = endpoints.lock_path(self._config, hung.service, hung.index)
        try:
            killed = signal_owner(path, hung.pid, signal.SIGKILL)
        except PermissionError:
            killed = False
        event = "hung member killed" if killed else "hung member cannot be killed from here"
        log.warning(
            event, member=name, pid=hung.pid, member_incarnation=hung.incarnation, silent_ms=hung.silent_ms
        )


async def role_main(config: PodConfig, index: int) -> None:
    """Run the manager; there is only one."""
    if index != 0:
        raise ConfigError(f"--index = {index}: there is one manager, manager-0")
    await ManagerProcess(config).run()


def main() -> None:
    """Entry of `python -P -m services.manager.process`."""
    process.run(role_main, "manager")


if __name__ == "__main__":
    main()
