"""`xds up`, `down`, `run`, `kill`: begin, end and disturb."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import NoReturn

from bus import config as settings
from bus.clock import Deadline
from bus.config import PodConfig
from bus.control import endpoints
from bus.control.lock import is_locked, read_owner, signal_owner
from bus.errors import ConfigError, ResourceError
from bus.shutdown import EXIT_FAILURE, EXIT_OK, EXIT_RESOURCE
from services.cli_status import ask_status
from services.manager.child import MODULES, command_of, environ_of
from services.manager.launcher import STOP_ORDER, Launcher
from services.manager.roster import expected_members

_POLL_S = 0.05


def up(config: PodConfig, *, verbose: bool) -> int:
    """Run a pod in the foreground."""
    return asyncio.run(Launcher(config, verbose=verbose).run())


def run(config: PodConfig, service: str, index: int) -> NoReturn:
    """Become one process of the pod.

    Raises:
        ConfigError: the pod has no such process.
    """
    count = sum(key[0] == service for key in expected_members(config))
    if not count:
        raise ConfigError(f"this pod has no {service}: see topology.prefill_workers")
    if not 0 <= index < count:
        raise ConfigError(f"--index = {index}: must be 0..{count - 1}, this pod has {count} x {service}")
    command = command_of(MODULES[service], index)
    os.execve(command[0], command, environ_of(config, os.environ))


def down(config: PodConfig) -> int:
    """Stop the pod's launcher and wait until nothing of the pod is left."""
    path = endpoints.pod_lock_path(config)
    owner = read_owner(path)
    if owner is None or not signal_owner(path, owner.pid, signal.SIGTERM):
        raise ResourceError(f"pod {config.pod} is not running (no launcher holds {path})")
    deadline = Deadline.after_ms((len(STOP_ORDER) + 2) * config.launcher.stop_timeout_ms)
    while is_locked(path):
        if deadline.expired():
            sys.stderr.write(f"xds: pod {config.pod}: launcher pid {owner.pid} does not end\n")
            return EXIT_FAILURE
        time.sleep(_POLL_S)
    left = endpoints.pod_segments(config) + [str(p) for p in settings.runtime_dir(config).glob("**/*.lock")]
    if left:
        sys.stderr.write(f"xds: pod {config.pod} has stopped but left {', '.join(left)}\n")
        return EXIT_FAILURE
    sys.stdout.write(f"pod {config.pod} has stopped\n")
    return EXIT_OK


def kill(config: PodConfig, target: str, signal_name: str) -> int:
    """Send a signal to the members that `target` (`SERVICE` or `SERVICE/I`) names."""
    service, slash, index = target.partition("/")
    if slash and not index.isdecimal():
        raise ConfigError(f"target = {target!r}: must be SERVICE or SERVICE/INDEX")
    pod_map = ask_status(config)
    if pod_map is None:
        sys.stderr.write(f"xds: pod {config.pod}: no manager answers\n")
        return EXIT_RESOURCE
    chosen = [
        member
        for member in pod_map.members
        if member.service == service and member.state != "dead" and (not slash or member.index == int(index))
    ]
    if not chosen:
        raise ConfigError(f"target = {target!r}: the pod has no such living member")
    exit_code = EXIT_OK
    for member in chosen:
        name = endpoints.member_name(member.service, member.index)
        path = endpoints.lock_path(config, member.service, member.index)
        try:
            sent = signal_owner(path, member.pid, signal.Signals[f"SIG{signal_name}"])
        except PermissionError:
            sent = False
        sys.stdout.write(f"{name} (pid {member.pid}) {f'SIG{signal_name} sent' if sent else 'not reached'}\n")
        exit_code = exit_code if sent else EXIT_FAILURE
    return exit_code
