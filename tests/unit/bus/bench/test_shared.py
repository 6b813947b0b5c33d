"""What a peer's library has left in /dev/shm goes with the run that made it, and nothing else does."""

from __future__ import annotations

import mmap
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.bench import shared

SHM = Path("/dev/shm")


@pytest.fixture
def prefix() -> Iterator[str]:
    found = f"unitbench{uuid.uuid4().hex[:8]}_"
    yield found
    for path in SHM.glob(f"{found}*"):
        path.unlink()


def mapped(name: str) -> mmap.mmap:
    with (SHM / name).open("w+b") as file:
        file.truncate(4096)
        return mmap.mmap(file.fileno(), 4096)


def test_what_was_mapped_is_removed_and_what_others_made_stays(tmp_path: Path, prefix: str) -> None:
    (SHM / f"{prefix}other").write_bytes(b"x")
    with mapped(f"{prefix}own"):
        shared.note_mapped(tmp_path, prefix)
    shared.remove_noted(tmp_path)
    assert [path.name for path in SHM.glob(f"{prefix}*")] == [f"{prefix}other"]
    shared.remove_noted(tmp_path)  # nothing is there any more


def test_a_file_that_has_got_the_name_since_stays(tmp_path: Path, prefix: str) -> None:
    path = SHM / f"{prefix}own"
    with mapped(path.name):
        shared.note_mapped(tmp_path, prefix)
        path.unlink()
        path.write_bytes(b"another run's")
        assert path.stat().st_ino != int(next(tmp_path.iterdir()).read_text().split()[0])
    shared.remove_noted(tmp_path)
    assert path.exists()


def test_only_the_named_kind_is_noted(tmp_path: Path, prefix: str) -> None:
    with mapped(f"{prefix}own"), mapped(f"{prefix}gone"):
        (SHM / f"{prefix}gone").unlink()
        shared.note_mapped(tmp_path, prefix)
        [note] = tmp_path.iterdir()
        assert [line.split()[1] for line in note.read_text().splitlines()] == [f"{prefix}own"]
        shared.note_mapped(tmp_path, "mpich_shm_")
    assert note.read_text() == ""
