"""The wheel holds `bus`, `gateway`, `services`, both C extensions and the demo model, and nothing else."""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("bus", "gateway", "services")
DEMO_BYTES_MAX = 20 * 1024**2
# Imports every module that the wheel brought, from where it was installed and from nowhere else.
IMPORT_ALL = """
import importlib, pathlib, sys
site = pathlib.Path(sys.argv[1])
for top in sys.argv[2:]:
    for path in sorted((site / top).rglob("*.py")):
        words = path.relative_to(site).with_suffix("").parts
        module = importlib.import_module(".".join(words[:-1] if words[-1] == "__init__" else words))
        assert pathlib.Path(module.__file__).is_relative_to(site), module
        print(module.__name__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the source, so that nothing built before can slip in."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    finished = subprocess.run([*command, str(folder / "source")], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an empty folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(folder), str(wheel)], check=True, timeout=60)
    return folder


def run_installed(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python outside the source tree with the installed wheel in front of everything else."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-P", *command],
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_exactly_our_packages_are_installed(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names_in(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def declared_extensions() -> list[str]:
    """Return the modules that setup.py builds from C."""
    calls = [
        node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)
    ]
    return [ast.literal_eval(c.args[0]) for c in calls if getattr(c.func, "id", "") == "Extension"]


def test_the_wheel_is_for_one_platform_and_holds_the_extensions(wheel: Path) -> None:
    assert not wheel.name.endswith("-none-any.whl")
    libraries = [name for name in names_in(wheel) if name.endswith(".so")]
    extensions = declared_extensions()
    assert {"bus.memory._native", "services.model._kernels"} <= set(extensions)
    assert sorted(name.split(".")[0].replace("/", ".") for name in libraries) == sorted(extensions)


def test_every_module_is_there_and_nothing_of_the_development(wheel: Path) -> None:
    sources = {
        str(path.relative_to(ROOT))
        for top in PACKAGES
        for path in (ROOT / top).rglob("*.py")
        if "train" not in path.parts
    }
    modules = {name for name in names_in(wheel) if name.endswith(".py")}
    assert modules == sources
    assert {f"{top}/py.typed" for top in PACKAGES} <= set(names_in(wheel))


def test_the_demo_model_is_there_and_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {
            info.filename.removeprefix("services/demo/"): info.file_size
            for info in archive.infolist()
            if info.filename.startswith("services/demo/")
        }
    assert {"config.json", "tokenizer.json"} <= {name.split("/")[-1] for name in files}
    assert any(name.endswith(".safetensors") for name in files)
    assert sum(files.values()) <= DEMO_BYTES_MAX


def test_the_command_is_declared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(name).decode())
    assert dict(entry_points["console_scripts"]) == {"xds": "services.cli:main"}


def test_every_installed_module_imports_from_the_wheel(site: Path) -> None:
    finished = run_installed(site, "-c", IMPORT_ALL, str(site), *PACKAGES)
    assert finished.returncode == 0, finished.stderr
    assert {"bus.errors", "gateway", "services.cli"} <= set(finished.stdout.split())


def test_the_installed_command_runs(site: Path) -> None:
    finished = run_installed(site, str(site / "bin" / "xds"), "--help")
    assert finished.returncode == 0, finished.stderr
    assert "usage: xds" in finished.stdout
