"""One child of the launcher: how it is started, when it is started again, where its output goes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import bus
from bus.clock import NS_PER_MS, NS_PER_S
from bus.config import LauncherConfig, PodConfig, resolved_json
from bus.control import endpoints
from bus.process import BLAS_VARIABLES
from services.manager.roster import Key

MODULES: dict[str, str] = {
    "manager": "services.manager.process",
    "gateway": "gateway.process",
    "scheduler": "services.scheduler.process",
    "attention": "services.attention.process",
    "expert": "services.expert.process",
    "shell": "services.shell.process",
    "prefill": "services.prefill.process",
}
LOG_BYTES_MAX = 10 * 1024**2
_TAIL_BYTES = 64 * 1024
_EARLY_NS = 10 * NS_PER_S


def command_of(module: str, index: int) -> list[str]:
    """Return the command line of one process. `-P`: folders of the working directory cannot shadow ours."""
    return [sys.executable, "-P", "-m", module, "--index", str(index)]


def environ_of(config: PodConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a pod's process: the resolved settings, one BLAS thread, our packages."""
    child = {**environ, "XDS_RESOLVED": resolved_json(config)}
    for name in BLAS_VARIABLES:
        child.setdefault(name, "1")
    packages = str(Path(bus.__file__).resolve().parents[1])
    if packages not in (
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
    ):  # run from a source tree
        known = environ.get("PYTHONPATH", "").split(os.pathsep)
        child["PYTHONPATH"] = os.pathsep.join(
            [packages, *(path for path in known if path and path != packages)]
        )
    return child


class Backoff:
    """How long to wait before starting a child again: not at all, unless it dies early again and again."""

    def __init__(self, config: LauncherConfig) -> None:
        self._first_ms = config.restart_backoff_ms
        self._ms_max = config.restart_backoff_ms_max
        self._num_early = 0

    def next_ms(self, *, early: bool) -> int:
        """Return the delay after a death; `early` = it died before it was ready, soon after its start."""
        self._num_early = self._num_early + 1 if early else 0
        if self._num_early < 2:
            return 0
        exponent = min(self._num_early - 2, 30)
        return min(self._ms_max, self._first_ms << exponent)


class Child:
    """A role's process, one incarnation after another.

    Args:
        key: (service, index).
        module: what to run.
        environ: its whole environment.
        log_path: file for its output; None = our stderr.
    """

    def __init__(
        self,
        key: Key,
        module: str,
        environ: Mapping[str, str],
        log_path: Path | None,
        config: LauncherConfig,
    ) -> None:
        self.service, self.index = key
        self.restart_at_ns: int | None = None
        self.was_ready = False
        self._command = command_of(module, self.index)
        self._environ = environ
        self._log_path = log_path
        self._backoff = Backoff(config)
        self._process: subprocess.Popen[bytes] | None = None
        self._started_ns = 0
        if log_path is not None:
            log_path.write_bytes(b"")

    @property
    def name(self) -> str:
        """E.g. `expert-2`."""
        return endpoints.member_name(self.service, self.index)

    @property
    def pid(self) -> int:
        """Process id, 0 when it does not run."""
        return self._process.pid if self._process is not None else 0

    @property
    def running(self) -> bool:
        """True from `start` until `reap` has seen its end."""
        return self._process is not None

    @property
    def started_ns(self) -> int:
        """Monotonic time of the last `start`."""
        return self._started_ns

    def start(self, now_ns: int) -> None:
        """Start the next incarnation. NOTE: by the main thread only, the child dies when its thread ends."""
        with self._open_output() as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches the launcher alone, which stops children in order. Not a session of its own: Linux
                # would make that an autogroup, and between those neither nice values nor yields count.
                process_group=0,
            )
        self._started_ns = now_ns
        self.restart_at_ns = None
        self.was_ready = False

    def reap(self) -> int | None:
        """Return the exit code if it has ended (negative: a signal's number), else None. Never blocks."""
        if self._process is None:
            return None
        code = self._process.poll()
        if code is not None:
            self._process = None
        return code

    def plan_restart(self, now_ns: int) -> int:
        """Decide when to start it again; return the delay in ms."""
        early = not self.was_ready and now_ns - self._started_ns < _EARLY_NS
        delay_ms = self._backoff.next_ms(early=early)
        self.restart_at_ns = now_ns + delay_ms * NS_PER_MS
        return delay_ms

    def send_signal(self, number: int) -> None:
        """Send a signal; a process that has just ended is no error."""
        if self._process is not None:
            self._process.send_signal(number)

    def terminate(self) -> None:
        """Ask it to stop; wake it first should somebody have stopped it."""
        self.send_signal(signal.SIGTERM)
        self.send_signal(signal.SIGCONT)

    def last_line(self) -> str:
        """Return the last line of its log, "" when it has none."""
        if self._log_path is None:
            return ""
        with contextlib.suppress(FileNotFoundError), self._log_path.open("rb") as log:
            log.seek(max(0, self._log_path.stat().st_size - _TAIL_BYTES))
            lines = log.read().decode("utf-8", "replace").splitlines()
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""

    def bound_log(self) -> None:
        """Move the log's content to `.1` once it exceeds `LOG_BYTES_MAX`; the child appends and goes on."""
        if self._log_path is None or self._log_path.stat().st_size <= LOG_BYTES_MAX:
            return
        shutil.copyfile(self._log_path, self._log_path.with_suffix(".log.1"))
        os.truncate(self._log_path, 0)

    @contextlib.contextmanager
    def _open_output(self) -> Iterator[IO[bytes] | int]:
        if self._log_path is None:
            yield sys.stderr.fileno()
        else:
            with self._log_path.open("ab") as log:
                yield log
