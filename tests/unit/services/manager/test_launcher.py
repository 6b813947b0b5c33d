"""A whole pod of tiny roles, started and ended as `xds up` does it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus import config as settings
from bus.control import endpoints
from bus.control.lock import is_locked, read_owner
from tests.harness.poll import eventually, is_running

ROOT = Path(__file__).parents[4]
SERVICES = ("gateway", "scheduler", "attention", "expert")
ROLE = """
import asyncio
from bus import process
from bus.control.member import Member
from bus.errors import ConfigError
async def role_main(config, index):
    async with Member(config, {service!r}, index) as member:
        {body}
        member.set_state("ready")
        await asyncio.Event().wait()
process.run(role_main, {service!r})
"""
UP = """
import asyncio, os, sys
from bus import config
from bus.errors import ConfigError, ResourceError
from services.manager.child import MODULES
from services.manager.launcher import Launcher
modules = MODULES | {s: f"fake_{s}" for s in ("gateway", "scheduler", "attention", "expert")}
try:
    sys.exit(asyncio.run(Launcher(config.load({}, None, os.environ), modules=modules).run()))
except (ConfigError, ResourceError) as error:
    sys.exit(str(error))
"""


class FakePod:
    """A pod whose roles greet and wait."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        (folder / "model" / "model.safetensors").touch()
        (folder / "up.py").write_text(UP)
        for service in SERVICES:
            self.write_role(service, "pass")
        own = {
            "XDS_POD": f"u{uuid.uuid4().hex[:8]}",
            "XDS_RUNTIME_DIR": str(folder / "run"),
            "XDS_MODEL": str(folder / "model"),
            "XDS_GATEWAY__PORT": "0",
            "XDS_TOPOLOGY__DP_GROUPS": "1",
            "XDS_TOPOLOGY__EXPERT_WORKERS": "2",
            "XDS_HEARTBEAT__INTERVAL_MS": "250",
            "XDS_HEARTBEAT__HANG_TIMEOUT_MS": "1000",
            "XDS_LAUNCHER__STOP_TIMEOUT_MS": "3000",
        }
        self.config = settings.load({}, None, own)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("XDS_")}
        self.environ = {**clean, **own, "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}
        self.out = folder / "out.txt"
        self.launcher: subprocess.Popen[str] | None = None

    def write_role(self, service: str, body: str) -> None:
        (self.folder / f"fake_{service}.py").write_text(ROLE.format(service=service, body=body))

    def up(self, **environ: str) -> subprocess.Popen[str]:
        with self.out.open("w") as out:
            self.launcher = subprocess.Popen(
                [sys.executable, "-P", str(self.folder / "up.py")],
                env={**self.environ, **environ},
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )
        return self.launcher

    def wait_ready(self) -> None:
        eventually(lambda: "READY 6/6" in self.out.read_text() or self.ended(), timeout_s=30, what="ready")
        assert "READY 6/6" in self.out.read_text(), self.out.read_text()

    def ended(self) -> bool:
        return self.launcher is None or self.launcher.poll() is not None

    def xds(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "services.cli", *arguments],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def pids(self) -> dict[str, int]:
        found = {}
        for path in sorted((self.folder / "run" / "locks").glob("*-*.lock")):
            owner = read_owner(path)
            if owner is not None and is_locked(path):
                found[path.stem] = owner.pid
        return found

    def incarnation(self, service: str, index: int) -> int:
        owner = read_owner(endpoints.lock_path(self.config, service, index))
        return owner.incarnation if owner else 0

    def stop(self) -> int:
        assert self.launcher is not None
        if self.launcher.poll() is None:
            self.launcher.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> int:
        assert self.launcher is not None
        return self.launcher.wait(timeout=30)

    def assert_nothing_left(self, pids: dict[str, int]) -> None:
        assert not (self.folder / "run").exists()
        assert endpoints.pod_segments(self.config) == []
        assert [name for name, pid in pids.items() if is_running(pid)] == []


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[FakePod]:
    pod = FakePod(tmp_path)
    yield pod
    if pod.launcher is not None and pod.launcher.poll() is None:
        pod.stop()


def test_up_serve_disturb_and_stop(pod: FakePod) -> None:
    pod.up()
    pod.wait_ready()
    before = pod.pids()
    assert len(before) == 6

    status = pod.xds("status", "--json")
    assert status.returncode == 0, status.stderr
    told = json.loads(status.stdout)
    assert (told["pod"], told["healthy"], told["serving_dp_groups"]) == (pod.config.pod, True, [0])
    assert {f"{m['service']}-{m['index']}": m["pid"] for m in told["members"]} == before
    assert {"service", "index", "pid", "incarnation", "state", "heartbeat_age_ms", "counters"} <= set(
        told["members"][0]
    )
    assert re.search(r"expert-1 +\d+ +1 +ready", pod.xds("status").stdout)

    second = pod.xds("up")
    assert second.returncode == 3
    assert f"pod {pod.config.pod} is already running" in second.stderr

    killed = pod.xds("kill", "expert/1")
    assert (killed.returncode, killed.stdout) == (0, f"expert-1 (pid {before['expert-1']}) SIGKILL sent\n")
    eventually(lambda: pod.incarnation("expert", 1) == 2, timeout_s=10, what="next incarnation")
    eventually(lambda: pod.xds("status").returncode == 0, timeout_s=10, what="healthy again")

    os.kill(before["manager-0"], signal.SIGKILL)
    eventually(lambda: pod.incarnation("manager", 0) == 2, timeout_s=10, what="next manager")
    eventually(lambda: pod.xds("status").returncode == 0, timeout_s=10, what="healthy again")
    after = pod.pids()
    assert {n for n in after if after[n] != before[n]} == {"expert-1", "manager-0"}

    assert pod.xds("kill", "expert/7").returncode == 2
    assert pod.xds("kill", "expert/x").returncode == 2
    down = pod.xds("down")
    assert (down.returncode, down.stdout) == (0, f"pod {pod.config.pod} has stopped\n")
    assert pod.wait() == 0  # no signal: one at the interpreter's very end would still kill it
    pod.assert_nothing_left(before | after)
    assert [pod.xds(command).returncode for command in ("status", "down")] == [3, 3]


def test_hung_processes_are_replaced(pod: FakePod) -> None:
    pod.up()
    pod.wait_ready()
    before = pod.pids()
    for name in ("expert-0", "manager-0"):  # the manager kills the one, the launcher the other
        os.kill(before[name], signal.SIGSTOP)
        service, index = name.split("-")
        eventually(
            lambda s=service, i=int(index): pod.incarnation(s, i) == 2, timeout_s=15, what=f"{name} replaced"
        )
        eventually(lambda: pod.xds("status").returncode == 0, timeout_s=15, what="healthy again")
    os.kill(pod.pids()["attention-0"], signal.SIGSTOP)
    assert pod.stop() == 0
    pod.assert_nothing_left(before)


def test_children_do_not_outlive_a_killed_launcher(pod: FakePod) -> None:
    launcher = pod.up()
    pod.wait_ready()
    before = pod.pids()
    launcher.kill()
    launcher.wait()
    eventually(lambda: pod.pids() == {}, timeout_s=10, what="children gone")
    pod.up()  # finds the remains and clears them away
    pod.wait_ready()
    assert pod.incarnation("expert", 0) == 1
    assert pod.stop() == 0
    pod.assert_nothing_left(before)


def test_a_setting_that_a_worker_refuses_ends_the_start(pod: FakePod) -> None:
    pod.write_role("expert", "raise ConfigError('config.json: model_type = 3: unsupported')")
    launcher = pod.up()
    assert launcher.wait(timeout=30) == 2
    assert re.search(
        r"^expert-[01]: config.json: model_type = 3: unsupported$", pod.out.read_text(), re.MULTILINE
    )
    pod.assert_nothing_left({})


def test_a_start_that_makes_no_progress_ends(pod: FakePod) -> None:
    pod.write_role("attention", "await asyncio.Event().wait()")
    launcher = pod.up(XDS_LAUNCHER__START_TIMEOUT_MS="1500")
    assert launcher.wait(timeout=30) == 1
    last = pod.out.read_text().splitlines()[-1]
    assert "no progress for 1500 ms (launcher.start_timeout_ms)" in last and "attention-0 starting" in last
    pod.assert_nothing_left({})


def test_an_impossible_start_leaves_nothing(pod: FakePod) -> None:
    launcher = pod.up(XDS_MODEL="/nonexistent")
    assert launcher.wait(timeout=30) == 1
    assert "/nonexistent is not a folder" in pod.out.read_text()
    pod.assert_nothing_left({})


def test_a_signal_during_the_start(pod: FakePod) -> None:
    pod.up()
    eventually(lambda: bool((pod.folder / "run" / "logs").exists()), timeout_s=10, what="start begun")
    assert pod.stop() == 0
    pod.assert_nothing_left({})
