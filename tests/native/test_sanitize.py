"""The bus's own tests, fuzz and kills included, under AddressSanitizer and UBSan. See sanitize.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.sanitize import TESTS, run, runtime, sanitized_tree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        runtime() is None, reason="the compiler has no libasan (Debian: apt-get install libasan8)"
    ),
]

OVERRUN = """
from bus.memory import _native
import ctypes

def test_an_overrun_is_seen():
    block = (ctypes.c_char * 64)()
    ctypes.pythonapi.PyMemoryView_FromMemory.restype = ctypes.py_object
    longer = ctypes.pythonapi.PyMemoryView_FromMemory(ctypes.c_void_p(ctypes.addressof(block)), 80, 0x200)
    _native.store_u64(longer, 64, 1)
"""


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with sanitized_tree() as directory:
        yield directory


@pytest.mark.parametrize("tests", TESTS)
def test_nothing_is_reported(tree: Path, tests: str) -> None:
    assert run(tree, [tests]).returncode == 0


def test_an_overrun_is_reported(tree: Path) -> None:
    """The runs above would end like this."""
    (tree / "tests" / "native" / "test_overrun.py").write_text(OVERRUN, encoding="ascii")
    assert run(tree, ["tests/native/test_overrun.py"]).returncode not in (0, 1, 2, 3, 4, 5)
