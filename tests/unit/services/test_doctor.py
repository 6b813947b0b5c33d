from __future__ import annotations

import socket
from pathlib import Path

import pytest

from bus import config as settings
from services import doctor


def test_doctor_finds_this_machine_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    (model / "model.safetensors").touch()
    overrides = {"runtime_dir": str(tmp_path / "run"), "model": str(model), "gateway.port": "0"}
    code = doctor.doctor(settings.load(overrides, None, {}))
    printed = capsys.readouterr().out
    assert (code, printed.splitlines()[-1]) == (0, "OK"), printed
    assert not (tmp_path / "run").exists()


def test_doctor_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        overrides = {"runtime_dir": str(tmp_path / "run"), "model": str(tmp_path), "gateway.port": port}
        code = doctor.doctor(settings.load(overrides, None, {}))
    printed = capsys.readouterr().out
    failed = [line.split()[1] for line in printed.splitlines() if line.startswith("FAIL ")]
    assert (code, failed, printed.splitlines()[-1]) == (1, ["port", "model"], "FAILED")
