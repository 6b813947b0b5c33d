"""The Compose file keeps its promises: one hardened container for each member of the pod that its settings describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from bus.config import PodConfig, TopologyConfig

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
MEMBERS = sorted(set(SERVICES) - {"bus"})
TOPOLOGY = TopologyConfig(prefill_workers=1)  # otherwise the default


def expected_members() -> dict[str, list[str]]:
    """Return the command of each container of the topology."""
    counts = {
        "scheduler": TOPOLOGY.dp_groups,
        "attention": TOPOLOGY.dp_groups,
        "expert": TOPOLOGY.expert_workers,
        "shell": 1,
        "prefill": TOPOLOGY.prefill_workers,
    }
    commands = {name: ["run", name, "--index", "0"] for name in ("manager", "gateway")}
    for service, count in counts.items():
        commands |= {f"{service}-{i}": ["run", service, "--index", str(i)] for i in range(count)}
    return commands


def test_one_container_for_each_member() -> None:
    assert {name: SERVICES[name]["command"] for name in MEMBERS} == expected_members()


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_container_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] <= 256
    assert service["restart"] == "unless-stopped"
    assert service["mem_limit"]
    assert not {"privileged", "cap_add", "devices"} & set(service)


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_shares_what_the_bus_owns(name: str) -> None:
    service = SERVICES[name]
    assert (service["ipc"], service["pid"]) == ("service:bus", "service:bus")
    assert service["depends_on"] == ["bus"]
    assert "runtime:/run/xds" in service["volumes"]
    assert service["volumes"] == SERVICES["bus"]["volumes"]


def test_the_bus_owns_them() -> None:
    assert SERVICES["bus"]["ipc"] == "shareable"
    assert not SERVICES["bus"]["pid"]
    assert SERVICES["bus"]["shm_size"]
    runtime = COMPOSE["volumes"]["runtime"]["driver_opts"]
    assert runtime["type"] == "tmpfs"
    assert {"uid=10001", "gid=10001", "mode=0700"} <= set(runtime["o"].split(","))


def test_only_the_gateway_has_a_network_and_only_on_loopback() -> None:
    assert [name for name in SERVICES if SERVICES[name].get("network_mode") != "none"] == ["gateway"]
    assert [name for name in SERVICES if "ports" in SERVICES[name]] == ["gateway"]
    assert [port.startswith("127.0.0.1:") for port in SERVICES["gateway"]["ports"]] == [True]


def test_all_members_have_the_same_settings() -> None:
    environments = [SERVICES[name]["environment"] for name in MEMBERS]
    assert all(environment == environments[0] for environment in environments)
    assert environments[0]["XDS_RUNTIME_DIR"] == "/run/xds"
    assert environments[0]["XDS_TOPOLOGY__DP_GROUPS"] == str(TOPOLOGY.dp_groups)
    assert environments[0]["XDS_TOPOLOGY__EXPERT_WORKERS"] == str(TOPOLOGY.expert_workers)
    assert environments[0]["XDS_TOPOLOGY__PREFILL_WORKERS"] == str(TOPOLOGY.prefill_workers)


def test_every_setting_exists() -> None:
    defaults = msgspec.to_builtins(PodConfig())
    for name in SERVICES["gateway"]["environment"]:
        node = defaults
        for word in name.removeprefix("XDS_").lower().split("__"):
            assert word in node, name
            node = node[word]


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_has_a_cheap_health_check(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    service, _, index = name.partition("-")
    assert check["test"] == ["CMD", "python", "-m", "bus.control.healthcheck", service, index or "0"]
    assert int(check["interval"].removesuffix("s")) >= 15


def test_the_user_of_the_image_is_the_user_of_the_volume() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "USER 10001:10001" in lines
    assert lines.count("FROM python:3.11-slim-bookworm") == 1
    assert 'ENTRYPOINT ["/opt/venv/bin/xds"]' in lines
