from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from bus import config as settings
from bus.config import PodConfig
from bus.control import endpoints
from bus.control.lock import OwnerLock
from bus.errors import ConfigError, ResourceError
from services.manager import preflight


@pytest.fixture
def config(tmp_path: Path) -> PodConfig:
    overrides = {
        "runtime_dir": str(tmp_path / "run"),
        "model": str(tmp_path / "model"),
        "pod": "unit",
        "launcher.stop_timeout_ms": "100",
    }
    return settings.load(overrides, None, {})


def test_a_folder_that_is_no_checkpoint(config: PodConfig, tmp_path: Path) -> None:
    model = tmp_path / "model"
    with pytest.raises(ConfigError, match="is not a folder"):
        preflight.check_model(config)
    model.mkdir()
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        preflight.check_model(config)
    (model / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"it has no \*\.safetensors"):
        preflight.check_model(config)
    (model / "model.safetensors").touch()
    preflight.check_model(config)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"gateway 127\.0\.0\.1:{port}: address already in use"):
            preflight.check_port(settings.load({"gateway.port": str(port)}, None, {}))
    preflight.check_port(settings.load({"gateway.port": str(port)}, None, {}))


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(ResourceError, match=r"gateway 192\.0\.2\.1:80"):
        preflight.check_port(settings.load({"gateway.host": "192.0.2.1", "gateway.port": "80"}, None, {}))


def test_a_second_pod_of_the_same_name(config: PodConfig) -> None:
    lock = preflight.take_pod(config)
    with pytest.raises(ResourceError, match=f"pod unit is already running .launcher pid {os.getpid()}."):
        preflight.take_pod(config)
    lock.release()


async def test_members_of_a_killed_launcher_are_waited_for(config: PodConfig) -> None:
    endpoints.ensure_runtime_dir(config)
    lock = OwnerLock.acquire(endpoints.lock_path(config, "attention", 1))
    assert preflight.any_member_lives(config)
    with pytest.raises(ResourceError, match=r"attention-1 of pod unit is still running"):
        await preflight.wait_members_gone(config)
    lock.release()
    await preflight.wait_members_gone(config)
    assert not preflight.any_member_lives(config)


def test_nothing_is_left_but_what_is_not_ours(config: PodConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for keep in (False, True):
        lock = preflight.take_pod(config)
        endpoints.lock_path(config, "expert", 0).touch()
        endpoints.logs_dir(config).mkdir()
        (endpoints.logs_dir(config) / "expert-0.log").touch()
        (run / "manager.sock").touch()
        if keep:
            (run / "mine.txt").touch()
        preflight.remove_files(config)
        lock.release()
        assert sorted(path.name for path in run.glob("**/*")) == (["mine.txt"] if keep else [])
        assert run.exists() == keep


async def test_segments_are_swept(config: PodConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    left = ["xds-unit-expert-0-1"]
    swept: list[str] = []
    monkeypatch.setattr(endpoints, "pod_segments", lambda _config: left)
    monkeypatch.setattr(
        preflight.segment, "sweep", lambda prefix: (swept.append(prefix), left.clear())[0] or []
    )
    assert await preflight.sweep_segments(config) == []
    assert swept == ["/xds-unit-"]
