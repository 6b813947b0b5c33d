"""How the scheduler of the kernel should treat a thread on the token path: a short slice, and perhaps a nice value.

A thread on the token path runs for microseconds and waits again, beside threads that compute for milliseconds. Linux
(EEVDF, since 6.6) runs first whose slice ends first, so a thread that asks for a *short slice* runs soon after it has
woken, without more of the CPU than the others get; since 6.12 every thread may ask for its own, without a privilege,
through `sched_setattr`'s sched_runtime. A *nice value* below the current one means a larger share and needs
CAP_SYS_NICE or RLIMIT_NICE.

NOTE: with autogroup (/proc/sys/kernel/sched_autogroup_enabled) nice values compare the threads of one session only,
and sessions share the CPU equally; /proc/PID/autogroup sets the nice value of a whole session.
"""

from __future__ import annotations

import ctypes
import os
import platform

NS_PER_US = 1_000
SLICE_US_MIN, SLICE_US_MAX = 100, 100_000  # the kernel's own bounds
_NUMBERS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # sched_setattr, sched_getattr
_FAIR_POLICIES = (os.SCHED_OTHER, os.SCHED_BATCH)


class _Attributes(ctypes.Structure):
    """`struct sched_attr`, version 0."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def prioritise(slice_us: int, nice: int = 0) -> tuple[int, int] | None:
    """Ask the kernel for a slice and a nice value for the calling thread, and those that it will start.

    Args:
        slice_us: 100..100,000 us, or 0 = leave it as it is.
        nice: added to the current value as `nice(1)` does; negative ones need a privilege.

    Returns:
        What is in force now, (slice in us, nice value), as the kernel says it: whatever it does not permit stays as it
        was; a slice of 0 = this kernel (before 6.12) has no slices of threads. None: the thread has a real-time policy,
        or the system is not known; nothing was changed.

    Raises:
        ValueError: `slice_us` is outside its bounds. Never for a lack of permission. Never blocks.
    """
    if slice_us and not SLICE_US_MIN <= slice_us <= SLICE_US_MAX:
        raise ValueError(f"slice_us: {slice_us} must be 0 or {SLICE_US_MIN}..{SLICE_US_MAX}")
    found = _get()
    if found is None or found.policy not in _FAIR_POLICIES:
        return None
    wanted = max(-20, min(19, found.nice + nice))
    found.runtime = slice_us * NS_PER_US or found.runtime
    found.flags = 0
    if wanted == found.nice or not _set(found, wanted):
        _set(found, found.nice)
    now = _get() or found
    return now.runtime // NS_PER_US, now.nice


def _call(number: int, *arguments: object) -> bool:
    return bool(ctypes.CDLL(None).syscall(number, *arguments) == 0)


def _get() -> _Attributes | None:
    numbers, found = _NUMBERS.get(platform.machine()), _Attributes()
    size = ctypes.sizeof(found)
    if numbers is None or not _call(numbers[1], 0, ctypes.byref(found), size, 0):
        return None
    return found


def _set(attributes: _Attributes, nice: int) -> bool:
    wanted = _Attributes.from_buffer_copy(attributes)
    wanted.size, wanted.nice = ctypes.sizeof(wanted), nice
    return _call(_NUMBERS[platform.machine()][0], 0, ctypes.byref(wanted), 0)
