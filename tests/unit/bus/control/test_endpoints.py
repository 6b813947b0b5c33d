from __future__ import annotations

import os
from pathlib import Path

import pytest

from bus import config as settings
from bus.config import PodConfig
from bus.control import endpoints
from bus.errors import ResourceError


@pytest.fixture
def config(tmp_path: Path) -> PodConfig:
    return settings.load({"pod": "p-1", "runtime_dir": str(tmp_path / "run")}, None, {})


def test_names(config: PodConfig, tmp_path: Path) -> None:
    assert endpoints.manager_endpoint(config) == f"ipc://{tmp_path}/run/manager.sock"
    own = endpoints.member_endpoint(config, "scheduler", 1, 4)
    assert own == f"ipc://{tmp_path}/run/scheduler-1.4.sock"
    assert endpoints.socket_path(own) == tmp_path / "run" / "scheduler-1.4.sock"
    assert endpoints.lock_path(config, "expert", 3) == tmp_path / "run" / "locks" / "expert-3.lock"
    assert endpoints.segment_name(config, "expert", 3, 9) == "/xds-p-1-expert-3-9"


def test_the_runtime_folder_is_private(config: PodConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    endpoints.ensure_runtime_dir(config)
    endpoints.ensure_runtime_dir(config)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run" / "locks").stat().st_mode & 0o777 == 0o700


def test_a_folder_of_other_things_is_refused_and_left_as_it_is(config: PodConfig, tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True, mode=0o755)
    (tmp_path / "run").chmod(0o755)
    with pytest.raises(ResourceError, match="holds logs, so it is no pod's: must be empty or absent"):
        endpoints.ensure_runtime_dir(config)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755


def test_a_file_in_its_place_is_named(config: PodConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ResourceError, match="is not a folder"):
        endpoints.ensure_runtime_dir(config)


def test_a_folder_of_another_user_is_refused(
    config: PodConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(ResourceError, match=f"belongs to user {uid}"):
        endpoints.ensure_runtime_dir(config)


def test_segments_of_a_pod_with_a_longer_name_are_not_ours(
    config: PodConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("xds-p-1-expert-0-1", "xds-p-1-expert-0-1-kv", "xds-p-1-x-expert-0-1", "xds-p-expert-0-1"):
        (tmp_path / name).touch()
    monkeypatch.setattr(endpoints, "SHM_DIR", tmp_path)
    assert endpoints.pod_segments(config) == ["xds-p-1-expert-0-1", "xds-p-1-expert-0-1-kv"]
