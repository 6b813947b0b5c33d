"""Where things of a pod live: every name of a socket, lock file and segment is made here and nowhere else.

::

    <runtime>/                               0700
        manager.sock                         well known: the way into the pod
        <service>-<index>.<incarnation>.sock a member's own ROUTER; each incarnation has a name of its own,
                                             so a message for one can never reach the next
        locks/<service>-<index>.lock         owner lock and incarnation counter
        locks/pod.lock                       the launcher's
        logs/<service>-<index>.log           the launcher's children
    /dev/shm/xds-<pod>-<service>-<index>-<incarnation>
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from bus import config as settings
from bus.config import PodConfig
from bus.errors import ResourceError

SHM_DIR = Path("/dev/shm")
_SERVICES = "gateway|manager|shell|scheduler|attention|expert|prefill"


def member_name(service: str, index: int) -> str:
    """Return e.g. `expert-2`."""
    return f"{service}-{index}"


def manager_endpoint(config: PodConfig) -> str:
    """Return the ZeroMQ address of the manager."""
    return f"ipc://{settings.runtime_dir(config) / 'manager.sock'}"


def member_endpoint(config: PodConfig, service: str, index: int, incarnation: int) -> str:
    """Return the ZeroMQ address that this incarnation of a member binds."""
    name = f"{member_name(service, index)}.{incarnation}.sock"
    return f"ipc://{settings.runtime_dir(config) / name}"


def socket_path(endpoint: str) -> Path:
    """Return the file of an `ipc://` address."""
    return Path(endpoint.removeprefix("ipc://"))


def locks_dir(config: PodConfig) -> Path:
    """Return the folder of the owner locks."""
    return settings.runtime_dir(config) / "locks"


def logs_dir(config: PodConfig) -> Path:
    """Return the folder of the children's logs."""
    return settings.runtime_dir(config) / "logs"


def lock_path(config: PodConfig, service: str, index: int) -> Path:
    """Return the owner lock of a member."""
    return locks_dir(config) / f"{member_name(service, index)}.lock"


def pod_lock_path(config: PodConfig) -> Path:
    """Return the lock that the launcher of the pod holds."""
    return locks_dir(config) / "pod.lock"


def segment_prefix(config: PodConfig) -> str:
    """Return what the names of all segments of the pod start with (with their leading slash)."""
    return f"/xds-{config.pod}-"


def segment_name(config: PodConfig, service: str, index: int, incarnation: int) -> str:
    """Return the POSIX name of the segment of one incarnation."""
    return f"{segment_prefix(config)}{member_name(service, index)}-{incarnation}"


def pod_segments(config: PodConfig) -> list[str]:
    """Return the names of this pod's segments that exist now, and of no pod whose name only starts alike."""
    pattern = re.compile(rf"{re.escape(segment_prefix(config)[1:])}({_SERVICES})-\d+-\d+.*")
    names = [entry.name for entry in SHM_DIR.iterdir()] if SHM_DIR.is_dir() else []
    return sorted(name for name in names if pattern.fullmatch(name))


def ensure_runtime_dir(config: PodConfig) -> Path:
    """Create the runtime folder and its `locks`, mode 0700, unless they exist.

    Raises:
        ResourceError: it cannot be made, belongs to somebody else, or holds files that are no pod's.
    """
    folder = settings.runtime_dir(config)
    try:
        _make(folder)
        _check_ours(folder)
        _make_private(folder)
        _make(locks_dir(config))
        _make_private(locks_dir(config))
    except OSError as error:
        raise ResourceError(f"runtime_dir {folder}: {error.strerror}") from None
    return folder


def _make(path: Path) -> None:
    missing = [path, *path.parents]
    for parent in reversed([folder for folder in missing if not folder.exists()]):
        parent.mkdir(mode=0o700, exist_ok=True)


def _check_ours(folder: Path) -> None:
    """Refuse somebody's folder of other things: its mode would be changed here, and its logs removed later."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    # `locks` is made first and removed last of all that a pod puts there.
    if names and "locks" not in names:
        raise ResourceError(
            f"runtime_dir {folder}: holds {names[0]}, so it is no pod's: must be empty or absent"
        )


def _make_private(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise ResourceError(f"runtime_dir {path}: is not a folder")
    if status.st_uid != os.getuid():
        raise ResourceError(f"runtime_dir {path}: belongs to user {status.st_uid}, not to {os.getuid()}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        path.chmod(0o700)
