"""The bus on Arm: what the compiler makes of each labelled order, and the bus's tests on an emulated CPU.

Tools: an aarch64 compiler (gcc-aarch64-linux-gnu) and qemu-aarch64 (qemu-user). The emulated interpreter is Debian's,
unpacked in a directory of its own; its libraries are wheels. Nothing is installed.

The emulator runs Arm's instructions, alignment and atomics in the host's order: it finds what depends on the
instruction set, not what depends on x86's memory order. Orders are checked in the assembly, where an acquire must be
`ldar` or `ldapr`, a release `stlr`, and so on. That the labelled orders suffice is for race, litmus and model tests.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.native.build import ExtensionSource, extensions

CROSS_COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"
TIMEOUT_S = 400
# What a C11 order must become. Armv8.1 has its own instruction for each read-modify-write.
INSTRUCTIONS = {
    "load ACQUIRE": r"ldapr|ldar",
    "load SEQ_CST": r"ldar",
    "store RELEASE": r"stlr",
    "store SEQ_CST": r"stlr",
    "fetch_add SEQ_CST": r"ldaddal",
    "add_fetch SEQ_CST": r"ldaddal",
    "add_fetch RELEASE": r"ldaddl|staddl|ldaddal",
    "sub_fetch ACQ_REL": r"ldaddal",
    "fetch_sub SEQ_CST": r"ldaddal",
    "compare_exchange SEQ_CST": r"casal",
    "compare_exchange ACQ_REL": r"casal",
    "thread_fence SEQ_CST": r"dmb\s+ish\b",
    "thread_fence RELEASE": r"dmb\s+ish\b",
    "thread_fence ACQUIRE": r"dmb\s+ish(ld)?\b",
}
ATOMIC = re.compile(
    r"__atomic_(load|store|fetch_add|add_fetch|fetch_sub|sub_fetch|compare_exchange|thread_fence)(?:_n)?\(.*?__ATOMIC_([A-Z_]+)"
)
FILE = re.compile(r'\s+\.file (\d+) (?:"[^"]*" )?"([^"]+)"')
LOCATION = re.compile(r"\s+\.loc (\d+) (\d+) ")


@dataclass(frozen=True)
class Ordered:
    """An atomic operation in the source: `operation` is a key of INSTRUCTIONS."""

    file: str
    line: int
    operation: str


def ordered_operations(path: Path) -> list[Ordered]:
    """Return the atomic operations of a file that order anything."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for name, order in ATOMIC.findall(line):
            if order != "RELAXED":
                found.append(Ordered(path.name, number, f"{name} {order}"))
    return found


def assembly(extension: ExtensionSource, source: Path, directory: Path) -> str:
    """Compile one source for aarch64, optimised as it is installed; return the assembly, with line numbers."""
    target = directory / f"{source.stem}.s"
    include = f"-I{sysconfig.get_path('include')}"
    flags = [*extension.flags, "-O3", "-g", "-march=armv8.1-a", include]
    subprocess.run(
        [CROSS_COMPILER, *flags, "-S", str(source), "-o", str(target)], check=True, timeout=TIMEOUT_S
    )
    return target.read_text(encoding="utf-8", errors="replace")


def instructions_by_line(text: str) -> dict[tuple[str, int], list[str]]:
    """Return the instructions that came of each (file, line), inlined copies included."""
    names: dict[str, str] = {}
    found: dict[tuple[str, int], list[str]] = {}
    place: tuple[str, int] | None = None
    for line in text.splitlines():
        if match := FILE.match(line):
            names[match[1]] = Path(match[2]).name
        elif match := LOCATION.match(line):
            place = (names.get(match[1], "?"), int(match[2]))
            found.setdefault(place, [])
        elif place is not None and line.startswith("\t") and not line.startswith("\t."):
            found[place].append(line.strip())
    return found


def missing_orders(operations: Sequence[Ordered], code: dict[tuple[str, int], list[str]]) -> list[str]:
    """Return what is not as INSTRUCTIONS says; lines that this code has no instruction of are left out."""
    wrong = []
    for operation in operations:
        instructions = code.get((operation.file, operation.line))
        pattern = INSTRUCTIONS[operation.operation]
        if instructions and not any(re.match(pattern, instruction) for instruction in instructions):
            wrong.append(f"{operation.file}:{operation.line}: {operation.operation} became {instructions}")
    return wrong


# ------------------------------------------------------------------ the emulated interpreter


PACKAGES = (
    "libpython{v}-minimal libpython{v}-stdlib libpython{v}-dev python{v}-minimal libc6 libgcc-s1 libstdc++6 zlib1g "
    "libexpat1 libffi8 libssl3 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1"
)
WHEELS = (
    "numpy",
    "msgspec",
    "posix_ipc",
    "orjson",
    "structlog",
    "uvloop",
    "pyzmq",
    "pytest",
    "pytest-asyncio",
    "hypothesis",
)
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


class Unavailable(Exception):
    """A tool or a package is missing; says which."""


@dataclass(frozen=True)
class ArmPython:
    """An arm64 interpreter under the emulator."""

    root: Path
    site: Path
    version: str

    @property
    def command(self) -> list[str]:
        """What runs it."""
        return [EMULATOR, "-L", str(self.root), str(self.root / "usr" / "bin" / f"python{self.version}")]

    def build(self, directory: Path) -> None:
        """Compile the bus's extensions for it, in the tree at `directory`."""
        include = self.root / "usr" / "include"
        headers = [f"-I{include / f'python{self.version}'}", f"-I{include}"]
        suffix = f".cpython-{self.version.replace('.', '')}-aarch64-linux-gnu.so"
        for extension in extensions(directory):
            target = directory / "bus" / "memory" / f"{extension.name}{suffix}"
            flags = [*extension.flags, "-O2", "-shared", "-fPIC", *headers]
            command = [CROSS_COMPILER, *flags, *map(str, extension.sources), "-lm", "-o", str(target)]
            subprocess.run(command, check=True, timeout=TIMEOUT_S)


def require_tools(*names: str) -> None:
    """Raise Unavailable naming the tools that are not installed."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"not installed: {', '.join(missing)} (see CONTRIBUTING.md, Arm)")


def _run(command: Sequence[str], directory: Path) -> None:
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        raise Unavailable(f"{command[0]}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")


def _apt(home: Path, *words: str) -> list[str]:
    """apt-get for arm64 with state and cache of its own: the machine's package system stays as it is."""
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": str(home / "state"),
        "Dir::State::status": str(home / "status"),
        "Dir::Cache": str(home / "cache"),
        "APT::Sandbox::User": "root",
    }
    return [
        "apt-get",
        "-qq",
        *[word for key, value in options.items() for word in ("-o", f"{key}={value}")],
        *words,
    ]


def fetch_python(home: Path) -> ArmPython:
    """Make an arm64 interpreter with the bus's libraries under `home`, or return the one that is there.

    Raises Unavailable. Needs the package mirrors the first time; about 60 MB.
    """
    require_tools(CROSS_COMPILER, EMULATOR, "apt-get", "dpkg-deb")
    done = home / "version"
    if done.is_file():
        return ArmPython(home / "root", home / "site", done.read_text(encoding="ascii"))
    shutil.rmtree(home, ignore_errors=True)
    for name in ("state/lists/partial", "cache/archives/partial", "debs", "root", "site"):
        (home / name).mkdir(parents=True)
    (home / "status").touch()
    _run(_apt(home, "update"), home)
    version = _fetch_packages(home)
    platforms = [
        f"--platform=manylinux{name}_aarch64" for name in ("2014", "_2_17", "_2_26", "_2_27", "_2_28")
    ]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        f"--python-version={version}",
        "--only-binary=:all:",
    ]
    _run([*pip, *platforms, f"--target={home / 'site'}", *WHEELS], home)
    done.write_text(version, encoding="ascii")
    return ArmPython(home / "root", home / "site", version)


def _fetch_packages(home: Path) -> str:
    error = Unavailable("no version of Python")
    for version in VERSIONS:
        try:
            _run(_apt(home, "download", *PACKAGES.format(v=version).split()), home / "debs")
        except Unavailable as reason:
            error = reason
            continue
        for package in (home / "debs").glob("*.deb"):
            _run(["dpkg-deb", "-x", str(package), str(home / "root")], home)
        return version
    raise error
