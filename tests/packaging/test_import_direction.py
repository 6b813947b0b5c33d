"""Arrows point down only: who may import whom, read from the source without running it.

`bus` imports nothing of ours; `gateway` imports `bus`; `services/*` import `bus` and the shared folders of
`services`; roles do not import one another; nobody imports `tests`. A `core.py` decides and never talks, so
it imports no clock, socket, process or source of randomness.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"bus", "gateway", "services", "tests"}
SHARED = {"model", "cache", "balance", "batching", "steps", "demo", "quantize"}  # that any role may import
IMPURE_MODULES = """
    asyncio concurrent datetime fcntl mmap multiprocessing os posix_ipc random secrets select selectors signal
    socket subprocess threading time uuid uvicorn uvloop zmq
"""


def imported_modules(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Yield the absolute name of all that `module` imports; for `from a import b` both `a` and `a.b`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _calls_import(node.func):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def _calls_import(func: ast.expr) -> bool:
    name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
    return name in {"import_module", "__import__"}


def role_of(module: str) -> str:
    """Return the folder of `services` that holds `module`, "" for the modules directly in `services`."""
    parts = module.split(".")
    if parts[0] != "services" or len(parts) < 2 or not (ROOT / "services" / parts[1]).is_dir():
        return ""
    return parts[1]


def broken_rule(module: str, imported: str) -> str | None:
    """Return the rule that `module` breaks by importing `imported`, None when it may."""
    here, there = module.split(".")[0], imported.split(".")[0]
    if there not in OURS:
        core = module.endswith(".core")
        return (
            "a core has no clock, socket, process or randomness"
            if core and there in IMPURE_MODULES.split()
            else None
        )
    if there == "tests":
        return "nobody imports tests"
    if here != there and there != "bus":
        return f"{here} never imports {there}"
    return _broken_role_rule(role_of(module), role_of(imported), module, imported)


def _broken_role_rule(here: str, there: str, module: str, imported: str) -> str | None:
    if here in SHARED and there and there not in SHARED:
        return f"{here} is shared by all roles and imports none"
    if here and imported.startswith("services.cli"):
        return "a role does not import the command line"
    if here in {"", "simulate"} or there in {"", here} or there in SHARED:
        return None  # the command line starts every role, the simulator runs every role's core
    return f"the role {here} does not import the role {there}"


def modules() -> list[tuple[str, Path]]:
    """Return name and path of every module that is packaged."""
    found = []
    for top in ("bus", "gateway", "services"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_arrows_point_down() -> None:
    broken = [
        f"{path.relative_to(ROOT)} imports {imported}: {rule}"
        for module, path in modules()
        for imported in imported_modules(path.read_text(), module, is_package=path.name == "__init__.py")
        if (rule := broken_rule(module, imported))
    ]
    assert broken == []


def test_the_tree_is_really_read() -> None:
    names = {module for module, _ in modules()}
    assert {"bus.errors", "bus.control.messages", "gateway", "services"} <= names


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bus.xccl.p2p", "from services.model import config"),
        ("bus.xccl.p2p", "import gateway.app"),
        ("gateway.app", "from services import cli"),
        ("gateway.app", "import importlib; importlib.import_module('services.cli')"),
        ("services.expert.process", "from gateway import app"),
        ("services.expert.process", "from services.attention.core import Core"),
        ("services.expert.process", "from ..attention import core"),
        ("services.expert.process", "from services.cli import main"),
        ("services.model.config", "from services.expert import core"),
        ("services.scheduler.core", "import time"),
        ("services.scheduler.core", "from os import path"),
        ("bus.clock", "from tests.harness import poll"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, source: str) -> None:
    assert any(broken_rule(module, name) for name in imported_modules(source, module, is_package=False))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bus.xccl.p2p", "from bus.memory import ring\nimport time"),
        ("gateway.app", "from bus.errors import BusError"),
        ("services.expert.process", "from services.model.numerics import matmul\nfrom . import core"),
        ("services.cli", "from services.manager import launcher"),
        ("services.scheduler.core", "import dataclasses\nfrom bus.control.messages import AddRequest"),
    ],
)
def test_a_right_arrow_passes(module: str, source: str) -> None:
    assert not any(broken_rule(module, name) for name in imported_modules(source, module, is_package=False))
