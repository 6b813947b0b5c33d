"""Runs the bus's tests on extensions that are built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.native.sanitize [arguments of pytest]

The bus and its tests are copied into a temporary directory, the extensions are built there, and pytest runs on the
copy with the sanitizer's runtime preloaded, because Python itself is not built with it. Leaks are not looked for:
the interpreter keeps too much for life. Any report ends the run with a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.native.build import ROOT, build_all, compiler

FLAGS = ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = (
    "tests/unit/bus/memory",
    "tests/unit/bus/xccl",
    "tests/property/bus",
    "tests/litmus/test_p2p_death.py",
)
COPIED = ("bus", "tests/unit/bus", "tests/property/bus", "tests/litmus", "tests/native", "tests/harness")
TIMEOUT_S = 1800


def runtime() -> str:
    """Return the path of the sanitizer's runtime library."""
    found = subprocess.run(
        [*compiler(), "-print-file-name=libasan.so"], check=True, capture_output=True, text=True, timeout=60
    )
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        raise SystemExit(
            "sanitize: the compiler has no libasan (Debian, Ubuntu: apt-get install libasan8 gcc)"
        )
    return str(path.resolve())


def copy_tree(directory: Path) -> None:
    """Copy what the tests need, without built extensions."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in COPIED:
        shutil.copytree(ROOT / name, directory / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "tests/conftest.py"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, directory / name)


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="xds-sanitize-") as name:
        directory = Path(name)
        copy_tree(directory)
        build_all(directory / "bus" / "memory", FLAGS, directory)
        env = {
            **os.environ,
            "LD_PRELOAD": runtime(),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "PYTHONPATH": str(directory),
            "PYTHONMALLOC": "malloc",  # so that the sanitizer sees every object's bounds
        }
        chosen = arguments if any(not word.startswith("-") for word in arguments) else [*TESTS, *arguments]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
        return subprocess.run(command, cwd=directory, env=env, check=False, timeout=TIMEOUT_S).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
