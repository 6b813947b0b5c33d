"""A run under way: its folder, the groups that live, what is missing or has failed, and what was found.

The folder is in /dev/shm: sockets, logs and what peers put into shared memory lie in it, begin with its name, or are
noted in it, so that `close` leaves nothing behind, whatever died. It holds a lock; what a killed run has left goes with
the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bus.bench.group import Group, GroupFailed, close_all
from bus.bench.launch import WAYS
from bus.bench.meeting import Message
from bus.bench.plan import Plan
from bus.bench.shared import SHM, remove_noted
from bus.bench.stats import Figures

PREFIX, LOCK = "xdsbench", "lock"
OURS = "ours"

Case = dict[str, int | str]


@dataclass(frozen=True, slots=True)
class Record:
    """What one way measured for one case. `extra` holds ratios and what is derived."""

    section: str
    way: str
    case: Case
    figures: Figures
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Absence:
    """Why there are no figures of a way in a section, or from some point on."""

    section: str
    way: str
    is_failure: bool
    reason: str


def to_stderr(text: str) -> None:
    """Show progress."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Session:
    """Holds everything of a run. Use as a context manager."""

    def __init__(self, plan: Plan, progress: Callable[[str], None] = to_stderr) -> None:
        self.plan, self.progress = plan, progress
        self.records: list[Record] = []
        self.trampolines: list[dict[str, Any]] = []
        self.absences: list[Absence] = []
        self.groups: dict[str, Group] = {}
        remove_abandoned()
        self.folder = SHM / f"{PREFIX}{os.getpid()}x{uuid.uuid4().hex[:6]}"
        self.folder.mkdir(mode=0o700)
        self._lock = (self.folder / LOCK).open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._began = time.monotonic()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def has_failed(self) -> bool:
        """Tell whether a way that is installed could not be measured."""
        return any(absence.is_failure for absence in self.absences)

    def say(self, text: str) -> None:
        """Show progress with the time since the beginning."""
        self.progress(f"[{time.monotonic() - self._began:5.0f} s] {text}")

    @contextlib.contextmanager
    def open(self, section: str, names: Sequence[str], num_ranks: int) -> Iterator[dict[str, Group]]:
        """Start the groups of those of `names` that are there; close them at the end."""
        self.say(f"{section}: starting {num_ranks} processes of each of {', '.join(names)}")
        try:
            for name in names:
                if reason := WAYS[name].missing():
                    self.note(Absence(section, name, False, reason))
                    continue
                try:
                    self.groups[name] = Group(WAYS[name], num_ranks, self.folder)
                except GroupFailed as error:
                    self.note(Absence(section, name, True, str(error)))
            yield self.groups
        finally:
            close_all(list(self.groups.values()))
            self.groups = {}

    def note(self, absence: Absence) -> None:
        """Note and show why something has no figures."""
        if absence not in self.absences:
            self.absences.append(absence)
            self.say(f"{absence.way}: {'failed' if absence.is_failure else 'missing'}: {absence.reason}")

    def ask(self, section: str, name: str, **command: Any) -> list[Any] | None:
        """Ask the group `name`; None, and the group is gone, if it failed."""
        message: Message = command
        try:
            return self.groups[name].ask(message)
        except GroupFailed as error:
            del self.groups[name]
            self.note(Absence(section, name, True, str(error)))
            return None

    def options(self, name: str) -> Message:
        """Return what the processes of `name` need to know about settings."""
        settings = {field: getattr(self.plan.xccl, field) for field in self.plan.xccl.__struct_fields__}
        return {"xccl": settings | ({"nice": WAYS[name].nice} if WAYS[name].nice else {})}

    def close(self) -> None:
        """End all processes and remove all that the run has made. Idempotent."""
        close_all(list(self.groups.values()))
        self.groups = {}
        _remove(self.folder)
        self._lock.close()


def remove_abandoned() -> None:
    """Remove what runs have left that were killed: those whose lock is free."""
    for folder in SHM.glob(f"{PREFIX}*/"):
        with contextlib.suppress(OSError), (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove the folder, all whose name begins with its name, and what is noted in it; the processes have ended."""
    for pattern in (f"xds-{folder.name}*", f"{folder.name}-*"):
        for path in SHM.glob(pattern):
            path.unlink(missing_ok=True)
    remove_noted(folder)
    shutil.rmtree(folder, ignore_errors=True)
