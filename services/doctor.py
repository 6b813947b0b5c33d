"""`xds doctor`: can this machine run a pod with these settings? A line per check, then `OK` or `FAILED`."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from bus import config as settings
from bus.clock import NS_PER_MS, now_ns
from bus.config import PodConfig
from bus.control import endpoints
from bus.control.lock import is_locked, read_owner
from bus.errors import BusError, ResourceError
from bus.shutdown import EXIT_FAILURE, EXIT_OK
from services.manager import preflight

_SHM = Path("/dev/shm")
_ROUND_TRIPS = 200
_WAIT_NS = 1000 * NS_PER_MS
_MEMORY_BYTES_MIN = 512 * 1024**2


def doctor(config: PodConfig) -> int:
    """Run every check; return 0 when all passed, 1 otherwise."""
    num_failed = 0
    for name, check in _CHECKS.items():
        try:
            result, mark = check(config), "ok  "
        except (BusError, OSError, ImportError, ArithmeticError, AssertionError, RuntimeError) as error:
            result, mark = " ".join(f"{type(error).__name__}: {error}".split()), "FAIL"
            num_failed += 1
        sys.stdout.write(f"{mark} {name:<18} {result}\n")
        sys.stdout.flush()
    sys.stdout.write("FAILED\n" if num_failed else "OK\n")
    return EXIT_FAILURE if num_failed else EXIT_OK


def _python(_config: PodConfig) -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    return f"{version} at {sys.executable}"


def _platform(_config: PodConfig) -> str:
    system = os.uname()
    if system.sysname != "Linux":
        raise ResourceError(f"{system.sysname}: futexes, open-file-description locks and /dev/shm need Linux")
    return f"{system.sysname} {system.release} {system.machine}, {os.cpu_count()} cores"


def _native(_config: PodConfig) -> str:
    from bus.memory import _native

    return f"bus.memory._native from {Path(_native.__file__).name}"


def _kernels(_config: PodConfig) -> str:
    from services.model import numerics

    started_ns = now_ns()
    numerics.check_row_independence()
    return f"rows do not depend on their neighbours ({(now_ns() - started_ns) // NS_PER_MS} ms)"


def _shared_memory(config: PodConfig) -> str:
    with tempfile.TemporaryFile(dir=_SHM) as file:
        file.truncate(mmap.PAGESIZE)
        with mmap.mmap(file.fileno(), mmap.PAGESIZE) as memory:
            memory[0] = 1
    file_system = os.statvfs(_SHM)
    free_bytes = file_system.f_bavail * file_system.f_frsize
    if free_bytes < 64 * 1024**2:
        raise ResourceError(f"{_SHM} has {free_bytes >> 20} MiB free, at least 64 are needed")
    return f"{_SHM} writable, {free_bytes >> 20} MiB free, bound {config.xccl.shared_bytes_max >> 20} MiB"


def _futex(_config: PodConfig) -> str:
    from bus.memory import _native

    with mmap.mmap(-1, mmap.PAGESIZE) as memory:

        def answer() -> None:
            for turn in range(_ROUND_TRIPS):
                if _native.wait_u32(memory, 0, turn, 0, _WAIT_NS) == turn:
                    return  # the other side sees the silence
                _native.store_u32(memory, 64, turn + 1)
                _native.futex_wake(memory, 64, 1)

        thread = threading.Thread(target=answer)
        thread.start()
        started_ns = now_ns()
        try:
            for turn in range(_ROUND_TRIPS):
                _native.store_u32(memory, 0, turn + 1)
                _native.futex_wake(memory, 0, 1)
                if _native.wait_u32(memory, 64, turn, 0, _WAIT_NS) == turn:
                    raise ResourceError(f"no wake-up within {_WAIT_NS // NS_PER_MS} ms")
        finally:
            thread.join()
        return f"round trip {(now_ns() - started_ns) / _ROUND_TRIPS / 1000:.0f} us"


def _memory(_config: PodConfig) -> str:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    available_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    if available_bytes < _MEMORY_BYTES_MIN:
        raise ResourceError(
            f"{available_bytes >> 20} MiB available, at least {_MEMORY_BYTES_MIN >> 20} are needed"
        )
    return f"{available_bytes >> 20} MiB available"


def _runtime_dir(config: PodConfig) -> str:
    folder = settings.runtime_dir(config)
    existed = folder.exists()
    endpoints.ensure_runtime_dir(config)
    if existed:
        return f"{folder}, mode 0700"
    preflight.remove_files(config)
    return f"{folder} can be made"


def _pod(config: PodConfig) -> str:
    path = endpoints.pod_lock_path(config)
    owner = read_owner(path)
    if owner is not None and is_locked(path):
        return f"{config.pod} is running (launcher pid {owner.pid})"
    return f"{config.pod} is not running"


def _port(config: PodConfig) -> str:
    where = f"{config.gateway.host}:{config.gateway.port}"
    if is_locked(endpoints.lock_path(config, "gateway", 0)):
        return f"{where} is used by this pod"
    preflight.check_port(config)
    return f"{where} is free"


def _model(config: PodConfig) -> str:
    preflight.check_model(config)
    return str(settings.model_path(config))


_CHECKS: dict[str, Callable[[PodConfig], str]] = {
    "python": _python,
    "platform": _platform,
    "native extension": _native,
    "kernels": _kernels,
    "shared memory": _shared_memory,
    "futex": _futex,
    "memory": _memory,
    "runtime folder": _runtime_dir,
    "pod": _pod,
    "port": _port,
    "model": _model,
}
