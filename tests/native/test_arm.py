"""No reliance on x86: each labelled order in the aarch64 assembly, and the bus's tests on an emulated Arm CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.native.arm import (
    CROSS_COMPILER,
    TIMEOUT_S,
    Unavailable,
    assembly,
    fetch_python,
    instructions_by_line,
    missing_orders,
    ordered_operations,
    require_tools,
)
from tests.native.build import MEMORY, extensions
from tests.native.sanitize import copy_tree

pytestmark = pytest.mark.slow
EMULATED = ("tests/unit/bus/memory", "tests/unit/bus/xccl")
SOURCES = [(extension, source) for extension in extensions() for source in extension.sources]


@pytest.fixture
def cross_compiler() -> None:
    try:
        require_tools(CROSS_COMPILER)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("extension", "source"), SOURCES, ids=[source.name for _, source in SOURCES])
def test_every_order_becomes_its_instruction(cross_compiler: None, extension, source, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    operations = [found for path in [source, *MEMORY.glob("*.h")] for found in ordered_operations(path)]
    code = instructions_by_line(assembly(extension, source, tmp_path))
    assert missing_orders(operations, code) == []
    own = [operation for operation in operations if operation.file == source.name]
    assert all((operation.file, operation.line) in code for operation in own), "an order has vanished"


def test_a_relaxed_order_is_noticed(cross_compiler: None, tmp_path: Path) -> None:
    """The check itself: take the orders from the real source and the code from one without them."""
    extension = next(extension for extension in extensions() if extension.name == "_native")
    real = MEMORY / "_native.c"
    text = real.read_text(encoding="utf-8")
    for order in ("RELEASE", "ACQUIRE"):
        (tmp_path / "bus").mkdir(exist_ok=True)
        mutant = tmp_path / "bus" / real.name
        mutant.write_text(text.replace(f"__ATOMIC_{order}", "__ATOMIC_RELAXED"), encoding="utf-8")
        flagged = replace(extension, flags=(*extension.flags, f"-I{MEMORY}"))
        code = instructions_by_line(assembly(flagged, mutant, tmp_path))
        wrong = missing_orders(ordered_operations(real), code)
        expected = [o for o in ordered_operations(real) if o.operation.endswith(order)]
        assert len(wrong) == len(expected) > 0


def test_the_bus_works_on_an_emulated_arm_cpu(tmp_path: Path) -> None:
    try:
        python = fetch_python(Path(sys.prefix) / "arm64")
    except Unavailable as reason:
        pytest.skip(str(reason))
    copy_tree(tmp_path)
    (tmp_path / "tests" / "conftest.py").unlink()  # it is about pods
    python.build(tmp_path)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{python.site}"}
    command = [*python.command, "-m", "pytest", "-q", "-p", "no:cacheprovider", *EMULATED]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
