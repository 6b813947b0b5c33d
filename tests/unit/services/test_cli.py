from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from bus import config as settings
from services import cli


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(cli.os.environ):
        if name.startswith("XDS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDS_RUNTIME_DIR", str(tmp_path / "run"))


def test_config_prints_what_a_file_may_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--pod", "p", "--set", "kv.cache_tokens=1024", "--set", 'model=/a "b"']) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "pod.toml"
    path.write_text(printed)
    assert tomllib.loads(printed)["kv"]["cache_tokens"] == 1024
    config = settings.load({}, path, {})
    assert (config.pod, config.model) == ("p", '/a "b"')


def test_config_hides_keys(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["config", "--set", "gateway.api_keys=secret"])
    printed = capsys.readouterr().out
    assert "secret" not in printed and 'gateway.api_keys = ["***"]' in printed


def test_flags_are_settings() -> None:
    options = cli._parser().parse_args(
        ["up", "--model", "m", "--host", "h", "--port", "1", "--dp-groups", "3", "--expert-workers", "5"]
    )
    config = cli._load(options)
    assert (config.gateway.host, config.gateway.port) == ("h", 1)
    assert (config.topology.dp_groups, config.topology.expert_workers) == (3, 5)
    assert config.model.endswith("/m")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["up", "--port", "x"], 2, "xds: gateway.port = 'x' (flag): Expected `int`"),
        (["up", "--set", "kv"], 2, "xds: --set kv: must be NAME=VALUE"),
        (["up", "--set", "kv.size=1"], 2, "xds: kv.size: no such setting"),
        (["up", "--model", "/nonexistent"], 2, "/nonexistent is not a folder"),
        (["status", "--config", "/nonexistent.toml"], 2, "/nonexistent.toml: No such file"),
        (["status"], 3, "xds: pod xds is not running"),
        (["down"], 3, "xds: pod xds is not running"),
        (["kill", "expert"], 3, "xds: pod xds is not running"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run", "baker"], ["kill", "expert", "--signal", "HUP"]])
def test_a_wrong_command_line_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: xds")


def test_help_lists_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "exit codes:" in capsys.readouterr().out
