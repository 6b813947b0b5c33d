"""Runs of `xds` that are expected to be refused: what they said, how they ended, what they left."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness.pod import XDS, pids_of

TIMEOUT_S = 60.0  # generous: the machine may be busy. A refusal that hangs fails


@dataclass(frozen=True)
class Refusal:
    """How one command ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def line(self) -> str:
        """The one line on stderr; AssertionError when there is none, or more, or a traceback."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1 and lines[0].strip(), f"must be one line:\n{self.stderr}"
        assert "Traceback" not in self.stderr
        return lines[0]


@dataclass(frozen=True)
class Bench:
    """A pod's name and folder that nobody else has, and nothing running in them."""

    name: str
    base: Path

    @property
    def runtime_dir(self) -> Path:
        """Where the pod's sockets and locks would lie."""
        return self.base / "run"

    def xds(self, *arguments: str, environ: Mapping[str, str] | None = None) -> Refusal:
        """Run `xds`, wait for its end."""
        ours = {"XDS_POD": self.name, "XDS_RUNTIME_DIR": str(self.runtime_dir)}
        result = subprocess.run(
            [*XDS, *arguments],
            env={**os.environ, **ours, **(environ or {})},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return Refusal(result.returncode, result.stdout, result.stderr)

    def up(self, model: Path | str, *flags: str, environ: Mapping[str, str] | None = None) -> Refusal:
        """Run `xds up` with the smallest topology; later flags win."""
        small = ("--port", "0", "--dp-groups", "1", "--expert-workers", "1")
        return self.xds("up", "--model", str(model), *small, *flags, environ=environ)

    def leftovers(self, *, keeps_locks: bool = False) -> list[str]:
        """Return processes, segments and runtime files that are left.

        `keeps_locks`: a single `xds run` leaves its lock file, which holds the incarnation counter.
        """
        left = [f"process {pid}" for pid in pids_of(self.name)]
        left += [str(path) for path in Path("/dev/shm").glob(f"xds-{self.name}-*")]
        found = [self.runtime_dir, *self.runtime_dir.rglob("*")] if self.runtime_dir.exists() else []
        return left + [str(p) for p in found if not (keeps_locks and (p.suffix == ".lock" or p.is_dir()))]


@contextmanager
def bench() -> Iterator[Bench]:
    """Yield a fresh bench; its folder, short enough for Unix sockets, is removed at the end."""
    base = Path(tempfile.mkdtemp(prefix="xds-"))
    try:
        yield Bench(f"t{uuid.uuid4().hex[:8]}", base)
    finally:
        shutil.rmtree(base)


def copy_checkpoint(source: Path, target: Path) -> Path:
    """Copy what a pod needs of a golden checkpoint."""
    names = [p for p in source.iterdir() if p.name not in ("expected.json", "logits.npz")]
    target.mkdir(parents=True)
    for path in names:
        shutil.copyfile(path, target / path.name)
    return target
