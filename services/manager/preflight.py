"""What the launcher checks before it starts anything, and what it clears away before and after."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from pathlib import Path

from bus import config as settings
from bus.clock import NS_PER_S, Deadline
from bus.config import PodConfig
from bus.control import endpoints
from bus.control.lock import OwnerLock, is_locked, read_owner
from bus.errors import ConfigError, ResourceError
from bus.memory import segment
from services.manager.roster import expected_members

_SWEEP_S = 3.0  # a segment that was being created when its owner died is swept only after a grace
_POLL_S = 0.05


def take_pod(config: PodConfig) -> OwnerLock:
    """Take the pod's lock.

    Raises:
        ResourceError: a pod of this name is running.
    """
    endpoints.ensure_runtime_dir(config)
    path = endpoints.pod_lock_path(config)
    try:
        return OwnerLock.acquire(path)
    except ResourceError:
        if not is_locked(path):
            raise
    owner = read_owner(path)
    who = f" (launcher pid {owner.pid})" if owner else ""
    raise ResourceError(
        f"pod {config.pod} is already running{who}: end it with `xds down`, or choose another --pod"
    )


def check_model(config: PodConfig) -> None:
    """Refuse a model that is plainly no checkpoint; the workers look closer.

    Raises:
        ConfigError: names the folder and what it lacks.
    """
    folder = settings.model_path(config)
    if not folder.is_dir():
        raise ConfigError(f"model = {config.model!r}: {folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model = {config.model!r}: {folder} is not a checkpoint: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model = {config.model!r}: {folder} is not a checkpoint: it has no *.safetensors")


def check_port(config: PodConfig) -> None:
    """Refuse an HTTP address that the gateway will not be able to bind.

    Raises:
        ResourceError: names host and port.
    """
    host, port = config.gateway.host, config.gateway.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the gateway does
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ResourceError(f"gateway {host}:{port}: {reason}") from None


async def wait_members_gone(config: PodConfig) -> None:
    """Wait until processes that a killed launcher left behind have ended; they do so by themselves.

    Raises:
        ResourceError: one still lives after `launcher.stop_timeout_ms`.
    """
    deadline = Deadline.after_ms(config.launcher.stop_timeout_ms)
    for service, index in expected_members(config):
        path = endpoints.lock_path(config, service, index)
        while is_locked(path):
            if deadline.expired():
                owner = read_owner(path)
                who = f" (pid {owner.pid})" if owner else ""
                name = endpoints.member_name(service, index)
                raise ResourceError(f"{name} of pod {config.pod} is still running{who}: end it first")
            await asyncio.sleep(_POLL_S)


def clear_files(config: PodConfig) -> None:
    """Remove sockets, logs and member locks that a dead pod left. Only for the holder of the pod's lock."""
    folder = settings.runtime_dir(config)
    for path in folder.glob("*.sock"):
        path.unlink(missing_ok=True)
    shutil.rmtree(endpoints.logs_dir(config), ignore_errors=True)
    for path in endpoints.locks_dir(config).glob("*.lock"):
        if path != endpoints.pod_lock_path(config):
            path.unlink(missing_ok=True)


async def sweep_segments(config: PodConfig) -> list[str]:
    """Remove the pod's segments whose owners have ended; return the names of those that are still there."""
    deadline = Deadline.after_ms(_SWEEP_S * NS_PER_S / 1e6)
    segment.sweep(endpoints.segment_prefix(config))
    while (left := endpoints.pod_segments(config)) and not deadline.expired():
        await asyncio.sleep(_POLL_S)
        segment.sweep(endpoints.segment_prefix(config))
    return left


def any_member_lives(config: PodConfig) -> bool:
    """Tell whether any member of the pod lives, whoever started it."""
    return any(is_locked(endpoints.lock_path(config, *key)) for key in expected_members(config))


def remove_files(config: PodConfig) -> None:
    """Remove all that the pod made on disk, its lock file last; the holder releases the lock afterwards."""
    clear_files(config)
    folder = settings.runtime_dir(config)
    endpoints.pod_lock_path(config).unlink(missing_ok=True)
    for path in (endpoints.locks_dir(config), folder, *_shared_parents(folder)):
        with contextlib.suppress(OSError):  # somebody else's files, or a mount: leave it
            path.rmdir()


def _shared_parents(folder: Path) -> list[Path]:
    """Return the folder of all pods if `folder` lies at its default place."""
    parent = folder.parent
    return [parent] if parent.name in ("xds", f"xds-{os.getuid()}") else []
