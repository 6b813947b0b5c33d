"""The pod of docker-compose.yml for tests, in a Compose project and on a port that nobody else has."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.harness.pod import free_port
from tests.harness.poll import eventually

ROOT = Path(__file__).resolve().parents[2]
BUILD_TIMEOUT_S = 900
COMMAND_TIMEOUT_S = 180
UID = 10001  # of the image


def compose_command() -> list[str]:
    """Return what `COMPOSE` names, else the Compose of this machine: 1.29's `docker-compose`, or 2's plugin."""
    default = "docker-compose" if shutil.which("docker-compose") else "docker compose"
    return os.environ.get("COMPOSE", default).split()


def docker(*arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Run a docker command; return what it prints."""
    return _run(["docker", *arguments], timeout_s, dict(os.environ))


def _run(command: list[str], timeout_s: float, environ: dict[str, str]) -> str:
    finished = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout_s
    )
    if finished.returncode != 0:
        output = f"{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
        raise AssertionError(f"{' '.join(command)} ended with {finished.returncode}:\n{output}")
    return finished.stdout


@dataclass
class ComposePod:
    """One Compose project."""

    project: str = field(default_factory=lambda: f"xds-test-{uuid.uuid4().hex[:8]}")
    port: int = field(default_factory=free_port)

    @property
    def url(self) -> str:
        """Base URL of the gateway, from the host."""
        return f"http://127.0.0.1:{self.port}"

    def compose(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a Compose command on this project; return what it prints."""
        environ = {**os.environ, "XDS_GATEWAY__PORT": str(self.port)}
        return _run([*compose_command(), "-p", self.project, *arguments], timeout_s, environ)

    def containers(self) -> dict[str, dict[str, Any]]:
        """Return what `docker inspect` says of each container, running or not, by service."""
        ids = docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={self.project}")
        found = json.loads(docker("inspect", *ids.split())) if ids.strip() else []
        return {entry["Config"]["Labels"]["com.docker.compose.service"]: entry for entry in found}

    def unhealthy(self) -> dict[str, str]:
        """Return the containers that are not running and healthy, with their state."""
        states = {name: entry["State"] for name, entry in self.containers().items()}
        return {
            name: f"{state['Status']}, {state.get('Health', {}).get('Status', 'no health check')}"
            for name, state in states.items()
            if state["Status"] != "running" or state.get("Health", {}).get("Status") != "healthy"
        }

    def wait_healthy(self, timeout_s: float) -> None:
        """Wait until each container is healthy."""
        eventually(
            lambda: len(self.containers()) > 1 and not self.unhealthy(),
            timeout_s=timeout_s,
            what=f"containers of {self.project} healthy",
            interval_s=0.5,
        )

    def answers(self) -> bool:
        """Tell whether `/health` says that a request can be served."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        return False

    def wait_serving(self, timeout_s: float) -> None:
        """Wait until `xds status` calls the whole pod healthy. Sooner known than by the health checks."""
        eventually(
            lambda: bool(self.status()["healthy"]), timeout_s=timeout_s, what="pod healthy", interval_s=0.5
        )

    def status(self) -> dict[str, Any]:
        """Return what `xds status --json` prints inside the gateway's container."""
        inside = "xds status --json || true"  # exit code 1 only says that the pod is not healthy
        printed = self.compose("exec", "-T", "gateway", "sh", "-c", inside).strip()
        status: dict[str, Any] = json.loads(printed) if printed else {"healthy": False, "members": []}
        return status

    def member(self, service: str, index: int) -> dict[str, Any]:
        """Return one member's entry of the status."""
        members = self.status()["members"]
        return next(m for m in members if m["service"] == service and m["index"] == index)

    @contextlib.contextmanager
    def killer(self, service: str, index: int) -> Iterator[Callable[[], None]]:
        """Yield a function that sends SIGKILL to a member's process at once, from inside another container.

        The shell is there before the kill is wanted: a `docker exec` takes as long as a short completion.
        """
        pid = self.member(service, index)["pid"]
        command = ["docker", "exec", "--interactive", self.containers()["expert-0"]["Id"], "sh"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as shell:
            assert shell.stdin is not None and shell.stdout is not None
            shell.stdin.write("echo ready\n")
            assert shell.stdout.readline() == "ready\n"
            yield functools.partial(print, f"kill -KILL {pid}", file=shell.stdin, flush=True)
            shell.stdin.close()

    def client(self) -> httpx.AsyncClient:
        """Return an HTTP client of the gateway."""
        return httpx.AsyncClient(base_url=self.url, timeout=120)

    def leftovers(self) -> list[str]:
        """Return what `down -v` must not leave: containers, volumes, networks; segments in the host's /dev/shm."""
        label = f"label=com.docker.compose.project={self.project}"
        lists = (("ps", "--all"), ("volume", "ls"), ("network", "ls"))
        left = [
            f"{words[0]} {name}"
            for words in lists
            for name in docker(*words, "--quiet", "--filter", label).split()
        ]
        return left + [str(entry) for entry in Path("/dev/shm").iterdir() if entry.stat().st_uid == UID]
