"""A machine that lacks something gets one clear line for each thing, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a user would: without the variables that a surrounding make hands down."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFL"))}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def complaints(*arguments: str) -> list[str]:
    finished = make(*arguments)
    assert finished.returncode != 0, finished.stdout
    return [line for line in finished.stderr.splitlines() if line.startswith("setup: ")]


def fake(folder: Path, name: str, script: str) -> str:
    """Write an executable shell script and return its path."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_help_lists_every_target() -> None:
    words = {
        "setup",
        "up",
        "down",
        "test",
        "lint",
        "bench",
        "bench-model",
        "bench-serve",
        "parity",
        "chaos",
        "clean",
        "test-docker",
    }
    assert words <= {line.split()[1] for line in make("help").stdout.splitlines()}


def test_missing_compiler_is_one_line_and_nothing_is_made(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    [line] = complaints("setup", f"VENV={venv}", "CC=/nonexistent/cc")
    assert line.startswith("setup: no C compiler /nonexistent/cc: ")
    assert "apt-get install gcc libc6-dev" in line
    assert not venv.exists()


def test_missing_interpreter_is_one_line() -> None:
    [line] = complaints("check", "PYTHON=/nonexistent/python3")
    assert line.startswith("setup: no Python interpreter /nonexistent/python3: ")


def test_each_missing_thing_has_its_own_line() -> None:
    lines = complaints("check", "PYTHON=/nonexistent/python3", "CC=/nonexistent/cc")
    assert [line.split()[1:3] for line in lines] == [["no", "Python"], ["no", "C"]]


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        ("version_info", "but Python >= 3.11 is needed"),
        ("ensurepip", "has no venv module (venv, ensurepip): apt-get install python3-venv"),
        ("Python.h", "has no C headers (Python.h): apt-get install python3-dev"),
    ],
)
def test_incomplete_interpreter_is_one_line(tmp_path: Path, refused: str, expected: str) -> None:
    python = fake(tmp_path, "python3", f'case "$*" in *{refused}*) exit 1;; *) exec python3 "$@";; esac')
    [line] = complaints("check", f"PYTHON={python}")
    assert expected in line


def test_compiler_without_c_library_is_one_line(tmp_path: Path) -> None:
    [line] = complaints("check", f"CC={fake(tmp_path, 'cc', 'exit 1')}")
    assert "finds no C library headers (stdlib.h): apt-get install libc6-dev" in line


def test_an_edited_c_source_makes_the_extensions_stale(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    for stamp in (".stamp-runtime", ".stamp-extensions", ".stamp-tools"):
        (venv / stamp).touch()
    assert make("--question", "setup", f"VENV={venv}").returncode == 0
    touched = ["--what-if=bus/memory/_native.c", f"VENV={venv}", "--dry-run", "setup"]
    assert "build_ext --inplace" in make(*touched).stdout
    assert "--editable" not in make(*touched).stdout
