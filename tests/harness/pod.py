"""A real pod for tests: `xds up` in a process of its own, with a name, a port and a directory that nobody else has."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.harness.poll import eventually

XDS = [sys.executable, "-P", "-m", "services.cli"]
START_TIMEOUT_S = 60.0


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Pod:
    """One running pod."""

    name: str
    port: int
    runtime_dir: Path
    launcher: subprocess.Popen[str]
    log: Path
    members_max: int = field(default=0)

    @property
    def url(self) -> str:
        """Base URL of the gateway."""
        return f"http://127.0.0.1:{self.port}"

    def xds(self, *arguments: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run an `xds` command against this pod."""
        return subprocess.run(
            [*XDS, *arguments],
            env=self.environ(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def environ(self) -> dict[str, str]:
        """The environment under which `xds` finds this pod."""
        return {**os.environ, "XDS_POD": self.name, "XDS_RUNTIME_DIR": str(self.runtime_dir)}

    def status(self) -> dict[str, Any]:
        """Return what `xds status --json` prints."""
        result = self.xds("status", "--json")
        if not result.stdout.strip():
            raise AssertionError(f"xds status said nothing: {result.stderr}")
        status: dict[str, Any] = json.loads(result.stdout)
        return status

    def member(self, service: str, index: int) -> dict[str, Any]:
        """Return one member's entry of the status."""
        return next(m for m in self.status()["members"] if m["service"] == service and m["index"] == index)

    def incarnation(self, service: str, index: int) -> int:
        """Return the newest incarnation of a member: the content of its lock file."""
        lock = self.runtime_dir / "locks" / f"{service}-{index}.lock"
        return int(lock.read_text().split()[0])

    def kill(self, service: str, index: int, sig: int = signal.SIGKILL) -> int:
        """Signal one member's process; return its pid."""
        pid = int(self.member(service, index)["pid"])
        os.kill(pid, sig)
        return pid

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until every member is ready."""

        def healthy() -> bool:
            if self.launcher.poll() is not None:
                raise AssertionError(
                    f"xds up ended with {self.launcher.returncode}:\n{self.log.read_text()[-4000:]}"
                )
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return bool(self.status()["healthy"])
            return False

        eventually(healthy, timeout_s=timeout_s, what=f"pod {self.name} healthy", interval_s=0.2)

    def stop(self) -> int:
        """End the pod as Ctrl-C does; return the exit code of `xds up`."""
        if self.launcher.poll() is None:
            self.launcher.send_signal(signal.SIGINT)
        try:
            return self.launcher.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            self.launcher.wait()
            raise AssertionError(f"xds up did not end:\n{self.log.read_text()[-4000:]}") from None

    def leftovers(self) -> list[str]:
        """Return what a stopped pod must not leave: segments, processes, runtime files."""
        left = [f"/dev/shm/{p.name}" for p in Path("/dev/shm").glob(f"xds-{self.name}-*")]
        left += [f"process {pid}" for pid in pids_of(self.name)]
        if self.runtime_dir.exists():
            left += [str(p) for p in self.runtime_dir.rglob("*") if not p.is_dir()]
        return left


def pids_of(pod: str) -> list[int]:
    """Return the processes that carry this pod's name in their environment and are not zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            environ = (entry / "environ").read_bytes()
            if f"XDS_POD={pod}\0".encode() in environ:
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def running_pod(
    model: Path | str, *flags: str, dp_groups: int = 2, expert_workers: int = 4, verbose: bool = True
) -> Iterator[Pod]:
    """Start a pod, wait until it is healthy, stop it at the end and assert that nothing is left.

    `verbose`: the log also holds what the members say.
    """
    name = f"t{uuid.uuid4().hex[:8]}"
    base = Path(tempfile.mkdtemp(prefix="xds-"))
    port = free_port()
    log = base / "up.log"
    command = [
        *XDS, "up", "--model", str(model), "--port", str(port), "--dp-groups", str(dp_groups),
        "--expert-workers", str(expert_workers), *(["--verbose"] if verbose else []), *flags,
    ]  # fmt: skip
    environ = {**os.environ, "XDS_POD": name, "XDS_RUNTIME_DIR": str(base / "run")}
    with log.open("w") as out:
        launcher = subprocess.Popen(
            command, env=environ, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    pod = Pod(name=name, port=port, runtime_dir=base / "run", launcher=launcher, log=log)
    try:
        pod.wait_healthy()
        yield pod
    except BaseException:
        sys.stderr.write(f"--- log of pod {name} (end)\n{log.read_text()[-6000:]}\n")
        raise
    finally:
        pod.stop()
    assert pod.leftovers() == []
    shutil.rmtree(base)
