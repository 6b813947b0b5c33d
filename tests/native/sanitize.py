"""Runs the bus's tests on extensions that are built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.native.sanitize [arguments of pytest]

The bus and its tests are copied into a temporary directory, the extensions are built there, and pytest runs on the
copy with the sanitizer's runtime preloaded, because Python itself is not built with it. Leaks are not looked for:
the interpreter keeps too much for life. Any report ends the run with a failure. test_sanitize.py is the same as tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
TIMEOUT_S = 600


def runtime() -> Path | None:
    """Return the sanitizer's runtime library, None if the compiler has none."""
    found = subprocess.run(
        [*compiler(), "-print-file-name=libasan.so"], check=True, capture_output=True, text=True, timeout=60
    )
    path = Path(found.stdout.strip())
    return path.resolve() if path.is_absolute() else None


def copy_tree(directory: Path) -> None:
    """Copy what the tests need, without built extensions."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in COPIED:
        shutil.copytree(ROOT / name, directory / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "tests/conftest.py", "bus/README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, directory / name)


@contextmanager
def sanitized_tree() -> Iterator[Path]:
    """A copy of the bus and its tests with sanitized extensions."""
    with tempfile.TemporaryDirectory(prefix="xds-sanitize-") as name:
        copy_tree(Path(name))
        build_all(Path(name) / "bus" / "memory", FLAGS, Path(name))
        yield Path(name)


def run(directory: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run pytest on the copy; its words go where this process's go."""
    env = {
        **os.environ,
        "LD_PRELOAD": str(runtime()),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(directory),
        "PYTHONMALLOC": "malloc",  # so that the sanitizer sees every object's bounds
    }
    env.pop("PYTEST_ADDOPTS", None)  # those are the outer run's
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=directory, env=env, check=False, timeout=TIMEOUT_S, text=True)


def main(arguments: list[str]) -> int:
    if runtime() is None:
        raise SystemExit("sanitize: the compiler has no libasan (Debian, Ubuntu: apt-get install libasan8)")
    chosen = arguments if any(not word.startswith("-") for word in arguments) else [*TESTS, *arguments]
    with sanitized_tree() as directory:
        return run(directory, chosen).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
