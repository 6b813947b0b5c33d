"""The `xds` command against a running pod: what it prints, what it does, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tomllib
from collections.abc import Iterator

import httpx
import pytest

from bus import config as settings
from tests.conftest import GOLDENS
from tests.harness.pod import XDS, Pod, running_pod
from tests.harness.poll import eventually
from tests.harness.refusal import bench

QWEN = GOLDENS / "qwen3_moe"
MEMBERS = ["manager-0", "expert-0", "expert-1", "attention-0", "scheduler-0", "gateway-0"]
HEAL_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    """A pod that these tests may disturb."""
    with running_pod(QWEN, dp_groups=1, expert_workers=2) as one:
        yield one


def xds(pod: Pod, *arguments: str) -> subprocess.CompletedProcess[str]:
    return pod.xds(*arguments, timeout_s=60)


def refused(result: subprocess.CompletedProcess[str], exit_code: int, said: str) -> None:
    assert result.returncode == exit_code, result
    assert result.stderr.count("\n") == 1 and said in result.stderr


def healed(pod: Pod, service: str, index: int, incarnation: int) -> bool:
    member = pod.member(service, index)
    return pod.status()["healthy"] and member["incarnation"] == incarnation and member["state"] == "ready"


# --------------------------------------------------------------------------- status


def test_status_for_people(pod: Pod) -> None:
    result = xds(pod, "status")
    assert result.returncode == 0 and result.stderr == ""
    head, titles, *rows = result.stdout.splitlines()
    assert re.fullmatch(rf"pod {pod.name}: healthy, serving DP groups: 0, epoch 0x[0-9a-f]+", head)
    assert titles.split() == ["MEMBER", "PID", "INCARNATION", "STATE", "HEARTBEAT", "COUNTERS"]
    cells = [row.split() for row in rows]
    assert sorted(row[0] for row in cells) == sorted(MEMBERS)
    assert all(row[1].isdecimal() and row[2] == "1" and row[3] == "ready" for row in cells)
    assert all(row[5:7] == ["ms", "ago"] for row in cells)


def test_status_as_json(pod: Pod) -> None:
    result = xds(pod, "status", "--json")
    assert result.returncode == 0 and result.stdout.count("\n") == 1
    status = json.loads(result.stdout)
    assert status.keys() == {"pod", "healthy", "epoch", "serving_dp_groups", "members"}
    assert (status["pod"], status["healthy"], status["serving_dp_groups"]) == (pod.name, True, [0])
    assert status["epoch"] > 1 << 32
    assert sorted(f"{m['service']}-{m['index']}" for m in status["members"]) == sorted(MEMBERS)
    for member in status["members"]:
        assert {
            "service",
            "index",
            "pid",
            "incarnation",
            "state",
            "heartbeat_age_ms",
            "counters",
        } <= member.keys()
        assert all(type(value) is int for value in member["counters"].values())
    assert pod.member("gateway", 0)["http"] == pod.url
    assert pod.member("expert", 1)["segment"] == f"/xds-{pod.name}-expert-1-1"


def test_status_of_no_pod() -> None:
    with bench() as place:
        for command in (["status"], ["status", "--json"], ["down"], ["kill", "expert/0"]):
            refusal = place.xds(*command)
            assert refusal.exit_code == 3 and f"pod {place.name} is not running" in refusal.line
            assert refusal.stdout == "" and place.leftovers() == []


# --------------------------------------------------------------------------- config and doctor


def test_config_is_a_file_of_settings(pod: Pod) -> None:
    result = xds(pod, "config", "--set", "kv.cache_tokens=1024")
    assert result.returncode == 0 and result.stderr == ""
    tree = tomllib.loads(result.stdout)
    assert (tree["pod"], tree["runtime_dir"]) == (pod.name, str(pod.runtime_dir))
    assert tree["kv"] == {"block_tokens": 16, "cache_tokens": 1024, "host_tokens": 0}
    names = [line.split(" = ")[0] for line in result.stdout.splitlines()]
    assert names == list(settings.settings())


def test_doctor_beside_a_running_pod(pod: Pod) -> None:
    result = xds(pod, "doctor", "--set", f"model={QWEN}", "--set", f"gateway.port={pod.port}")
    assert result.returncode == 0, result.stdout
    *checks, last = result.stdout.splitlines()
    assert last == "OK" and all(line.startswith("ok  ") for line in checks)
    assert f"{pod.name} is running (launcher pid {pod.launcher.pid})" in result.stdout
    assert pod.status()["healthy"]


def test_doctor_without_a_pod_leaves_nothing() -> None:
    with bench() as place:
        result = place.xds("doctor", "--set", f"model={QWEN}", "--set", "gateway.port=0")
        assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "OK")
        assert place.leftovers() == []


def test_doctor_names_what_is_wrong() -> None:
    with bench() as place:
        result = place.xds("doctor", "--set", "model=/nonexistent", "--set", "gateway.port=0")
        assert (result.exit_code, result.stdout.splitlines()[-1]) == (1, "FAILED")
        (failed,) = [line for line in result.stdout.splitlines() if line.startswith("FAIL ")]
        assert "/nonexistent is not a folder" in failed
        assert place.leftovers() == []


# --------------------------------------------------------------------------- kill


@pytest.mark.parametrize(
    ("service", "index"), [("expert", 1), ("attention", 0), ("scheduler", 0), ("manager", 0)]
)
def test_kill_and_heal(pod: Pod, service: str, index: int) -> None:
    before = pod.member(service, index)
    result = xds(pod, "kill", f"{service}/{index}")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout == f"{service}-{index} (pid {before['pid']}) SIGKILL sent\n"
    eventually(
        lambda: healed(pod, service, index, before["incarnation"] + 1),
        timeout_s=HEAL_TIMEOUT_S,
        what=f"the next incarnation of {service}-{index}",
        interval_s=0.2,
    )
    assert pod.member(service, index)["pid"] != before["pid"]
    assert served(pod)


def test_kill_all_of_a_service(pod: Pod) -> None:
    before = [pod.incarnation("expert", index) for index in range(2)]
    result = xds(pod, "kill", "expert", "--signal", "TERM")
    assert result.returncode == 0
    assert re.fullmatch(r"(expert-[01] \(pid \d+\) SIGTERM sent\n){2}", result.stdout)
    for index in range(2):
        eventually(
            lambda index=index: healed(pod, "expert", index, before[index] + 1),  # type: ignore[misc]
            timeout_s=HEAL_TIMEOUT_S,
            what=f"the next incarnation of expert-{index}",
            interval_s=0.2,
        )
    assert served(pod)


def served(pod: Pod) -> bool:
    body = {"prompt": [5, 9], "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{pod.url}/v1/completions", json=body, timeout=60).status_code == 200


def test_kill_of_nobody(pod: Pod) -> None:
    pids = [member["pid"] for member in pod.status()["members"]]
    refused(xds(pod, "kill", "expert/7"), 2, "target = 'expert/7': the pod has no such living member")
    refused(xds(pod, "kill", "baker"), 2, "target = 'baker': the pod has no such living member")
    refused(xds(pod, "kill", "expert/x"), 2, "target = 'expert/x': must be SERVICE or SERVICE/INDEX")
    assert [member["pid"] for member in pod.status()["members"]] == pids


# --------------------------------------------------------------------------- the end


def test_down_waits_until_nothing_is_left(pod: Pod) -> None:
    """The last of this file: it ends the pod."""
    result = xds(pod, "down")
    assert (result.returncode, result.stdout) == (0, f"pod {pod.name} has stopped\n"), result.stderr
    assert pod.launcher.wait(timeout=30) == 0
    assert pod.leftovers() == []
    refused(xds(pod, "down"), 3, f"pod {pod.name} is not running")
    refused(xds(pod, "status"), 3, f"pod {pod.name} is not running")


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGHUP], [signal.SIGTERM, signal.SIGINT]])
def test_a_signal_while_the_pod_starts(numbers: list[signal.Signals]) -> None:
    """The first one stops, a second one does not wait for anybody."""
    with bench() as place:
        command = [
            *XDS,
            "up",
            "--model",
            str(QWEN),
            "--port",
            "0",
            "--dp-groups",
            "1",
            "--expert-workers",
            "1",
        ]
        environ = {**os.environ, "XDS_POD": place.name, "XDS_RUNTIME_DIR": str(place.runtime_dir)}
        with subprocess.Popen(
            command,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as launcher:
            assert launcher.stdout is not None
            assert launcher.stdout.readline().startswith("ready ")  # members run, and the manager answers
            for number in numbers:
                launcher.send_signal(number)
            _, stderr = launcher.communicate(timeout=60)
        assert (launcher.returncode, stderr) == (0, "")
        assert place.leftovers() == []
