"""The shell of a role, as a real process: exit codes, last words, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bus.process import BLAS_VARIABLES

ROLE = """
import asyncio, os, sys
from bus import process
from bus.control.member import Member
from bus.errors import ConfigError, ResourceError
from bus.shutdown import current_shutdown
import structlog

async def role_main(config, index):
    async with Member(config, "expert", index):
        structlog.get_logger().info("hello")
        sys.stdout.write(f"up {os.environ['OPENBLAS_NUM_THREADS']}\\n")
        sys.stdout.flush()
        try:
            {body}
        finally:
            sys.stdout.write("cleaned up\\n")

process.run(role_main, "expert")
"""
FOREVER = "await asyncio.Event().wait()"


class Role:
    """Starts roles in a runtime folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("XDS_")}
        self.environ |= {"XDS_RUNTIME_DIR": str(folder / "run"), "XDS_LOG_FORMAT": "json"}
        for name in BLAS_VARIABLES:
            self.environ.pop(name, None)

    def start(self, body: str, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        path = self.folder / "role.py"
        path.write_text(ROLE.replace("{body}", body))
        return subprocess.Popen(
            [sys.executable, "-P", str(path), *arguments],
            env={**self.environ, **environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, body: str, *arguments: str, **environ: str) -> tuple[int, str, list[str]]:
        """Return exit code, stdout and the lines of stderr."""
        process = self.start(body, *arguments, **environ)
        out, err = process.communicate(timeout=20)
        return process.returncode, out, err.splitlines()


@pytest.fixture
def role(tmp_path: Path) -> Role:
    return Role(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(role: Role, number: signal.Signals) -> None:
    process = role.start(FOREVER)
    assert process.stdout is not None
    assert process.stdout.readline() == "up 1\n"  # one BLAS thread, although nobody set it
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "cleaned up\n")
    line = json.loads(err.splitlines()[0])
    expected = {
        "pod": "xds",
        "service": "expert",
        "index": 0,
        "incarnation": 1,
        "event": "hello",
        "level": "info",
    }
    assert {name: line[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("body", "code", "last_line"),
    [
        ("raise ConfigError('a = 1:\\n must be 2')", 2, "expert-0: a = 1: must be 2"),
        ("raise ResourceError('no memory')", 3, "expert-0: no memory"),
        (
            "current_shutdown.get().request(4, 'refused by the manager: x'); " + FOREVER,
            4,
            "expert-0: refused by the manager: x",
        ),
        ("pass", 0, None),
    ],
)
def test_exit_codes_and_last_words(role: Role, body: str, code: int, last_line: str | None) -> None:
    returncode, out, err = role.run(body)
    assert returncode == code
    assert "cleaned up" in out
    if last_line is not None:
        assert err[-1] == last_line


def test_an_unexpected_error_is_logged_with_its_traceback(role: Role) -> None:
    returncode, _, err = role.run("raise KeyError('lost')")
    assert returncode == 1
    assert "KeyError: 'lost'" in json.loads(err[-1])["exception"]


def test_a_bad_setting_is_one_line(role: Role) -> None:
    returncode, out, err = role.run(FOREVER, XDS_GATEWAY__PORT="x")
    assert (returncode, out) == (2, "")
    assert err == ["expert-0: gateway.port = 'x' (environment XDS_GATEWAY__PORT): Expected `int`, got `str`"]


def test_a_bad_index_is_refused(role: Role) -> None:
    returncode, _, err = role.run(FOREVER, "--index", "64")
    assert returncode == 2
    assert "--index = 64: must be 0..63" in err[-1]


def test_a_task_that_ignores_its_end_is_ended(role: Role) -> None:
    stubborn = """
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    pass
    """.strip()
    process = role.start(stubborn, XDS_LAUNCHER__STOP_TIMEOUT_MS="100")
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 1


def test_it_does_not_outlive_its_launcher(role: Role) -> None:
    returncode, out, _ = role.run(FOREVER, XDS_PDEATHSIG="1")  # that launcher is not our parent: it has died
    assert (returncode, out) == (0, "")
