"""What idle processes cost: how often they wake up, and what a wake-up takes, beside others in the same seconds.

How much CPU time a wake-up takes is the host's business: 50 us here, 400 us there, where caches are cold. So three
sleepers (`sleeper.py`), each of which wakes up as seldom as a service and does as little, run meanwhile, and each
process is held to a small multiple of what they take for as many wake-ups. Then work that is nobody's wake-up stands
out on any host.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NUM_SLEEPERS = 3
COST_MULTIPLE_MAX = 3.0  # services take 0.7 to 1.4 times what a sleeper takes for a wake-up
_SLEEPER = [sys.executable, "-P", str(Path(__file__).with_name("sleeper.py"))]


@dataclass(frozen=True, slots=True)
class Use:
    """What processes have used: how often their threads went to sleep, and CPU time."""

    wake_ups: int
    cpu_ns: int

    def __sub__(self, earlier: Use) -> Use:
        return Use(self.wake_ups - earlier.wake_ups, self.cpu_ns - earlier.cpu_ns)


def excesses(used: Mapping[str, Use], sleepers: Use, interval_s: float, wake_ups_max: float) -> list[str]:
    """Say what is too much.

    Args:
        used: by name of process, within the interval.
        sleepers: all of them together, within the same interval.
        interval_s: its length.
        wake_ups_max: a second, of all processes together.

    Returns:
        A line for each excess; none = they idle.
    """
    found = []
    rate = sum(use.wake_ups for use in used.values()) / interval_s
    if rate > wake_ups_max:
        each = ", ".join(f"{name} {use.wake_ups / interval_s:.1f}" for name, use in used.items())
        found.append(f"{rate:.0f} wake-ups a second, not {wake_ups_max:.0f}: {each}")
    cost_ns = sleepers.cpu_ns / sleepers.wake_ups
    for name, use in used.items():
        if use.cpu_ns > COST_MULTIPLE_MAX * cost_ns * use.wake_ups:
            share = use.cpu_ns / interval_s / 1e9
            found.append(
                f"{name} used {share:.2%} of a core for {use.wake_ups} wake-ups, which cost a sleeper "
                f"{cost_ns / 1000:.0f} us each"
            )
    return found


def watch(pids: Mapping[str, int], sleepers: Sequence[int], interval_s: float) -> tuple[dict[str, Use], Use]:
    """Let `interval_s` pass; return what each process used meanwhile, and all sleepers together."""
    before = {pid: _use(pid) for pid in [*pids.values(), *sleepers]}
    _sleep_until(time.monotonic() + interval_s)
    used = {pid: _use(pid) - earlier for pid, earlier in before.items()}
    each = [used[pid] for pid in sleepers]
    together = Use(sum(use.wake_ups for use in each), sum(use.cpu_ns for use in each))
    return {name: used[pid] for name, pid in pids.items()}, together


@contextlib.contextmanager
def sleeping() -> Iterator[list[int]]:
    """Run the sleepers; yield their process ids."""
    with contextlib.ExitStack() as stack:
        sleepers = []
        for _ in range(NUM_SLEEPERS):
            sleeper = stack.enter_context(subprocess.Popen(_SLEEPER, stdout=subprocess.PIPE, text=True))
            stack.callback(sleeper.kill)
            sleepers.append(sleeper)
        for sleeper in sleepers:
            assert sleeper.stdout is not None and sleeper.stdout.readline() == "ready\n"
        yield [sleeper.pid for sleeper in sleepers]


def _use(pid: int) -> Use:
    wake_ups = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        wake_ups += int(lines["voluntary_ctxt_switches"])
    return Use(wake_ups, _cpu_ns(pid))


def _cpu_ns(pid: int) -> int:
    """User and system time of all threads, also those that have ended; /proc has it in ticks of 10 ms only."""
    clock = ctypes.c_int()
    if error := ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise OSError(error, os.strerror(error), f"CPU clock of process {pid}")
    return time.clock_gettime_ns(clock.value)


def _sleep_until(at_monotonic_s: float) -> None:
    """Sleep to an absolute time (for measurements over an interval, never to wait for something to happen)."""
    while (left := at_monotonic_s - time.monotonic()) > 0:
        time.sleep(left)
