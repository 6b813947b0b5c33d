"""The file of the host tier: contents, bounds, and that no name is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bus.control.messages import PlannedSequence, SamplingParams, StepPlan
from bus.errors import ResourceError
from services.steps.host_file import HostFile
from services.steps.rows import check_plan

BLOCK_BYTES = 4096


@pytest.fixture
def host_file(tmp_path: Path) -> Iterator[HostFile]:
    file = HostFile(tmp_path / "kv", num_slots=3, block_bytes=BLOCK_BYTES)
    yield file
    file.close()


def block(value: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.full((2, BLOCK_BYTES // 8), value, np.float32)


def test_what_was_stored_is_loaded_bit_for_bit(host_file: HostFile) -> None:
    nan = np.frombuffer(b"\x01\x02\xa0\x7f" * (BLOCK_BYTES // 4), np.float32).reshape(2, -1)
    for slot, stored in enumerate((block(1), nan, block(3))):
        host_file.store(slot, stored)
    for slot, stored in enumerate((block(1), nan, block(3))):
        loaded = block(0)
        host_file.load(slot, loaded)
        assert loaded.tobytes() == stored.tobytes()


def test_it_has_no_name_and_a_leftover_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    path.write_text("left by a process that died")
    file = HostFile(path, num_slots=2, block_bytes=BLOCK_BYTES)
    assert list(tmp_path.iterdir()) == []
    (fd,) = [int(fd) for fd in os.listdir("/proc/self/fd") if _is_of(fd, path)]
    status = os.fstat(fd)
    assert (status.st_mode & 0o777, status.st_size) == (0o600, 2 * BLOCK_BYTES)
    file.close()
    file.close()
    assert not [fd for fd in os.listdir("/proc/self/fd") if _is_of(fd, path)]


def _is_of(fd: str, path: Path) -> bool:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink()).startswith(str(path))
    except OSError:
        return False


def test_no_room_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"kv: 4096 bytes for kv\.host_tokens: No such file or directory"):
        HostFile(tmp_path / "none" / "kv", num_slots=1, block_bytes=BLOCK_BYTES)


def test_reading_is_measured(host_file: HostFile) -> None:
    assert host_file.bytes_per_s() > 0


@pytest.mark.parametrize(
    ("moves", "rule"),
    [
        ({"stores": ((4, 0),)}, r"step 7: stores \(4, 0\): must be below 4 and 2"),
        ({"stores": ((0, 2),)}, r"stores \(0, 2\)"),
        ({"loads": ((2, 0),)}, r"loads \(2, 0\): must be below 2 and 4"),
        ({"loads": ((0, -1),)}, r"loads \(0, -1\)"),
        ({"copies": ((0, 4),)}, r"copies \(0, 4\): must be below 4 and 4"),
    ],
)
def test_moves_out_of_bounds_are_refused(moves: dict[str, tuple[tuple[int, int], ...]], rule: str) -> None:
    sequence = PlannedSequence(
        request_id="a",
        token_ids=(1,),
        start=0,
        block_table=(0,),
        sample=True,
        sampling=SamplingParams(max_tokens=1),
    )
    bounds = {"rows_max": 8, "num_blocks": 4, "block_tokens": 4, "vocab_size": 10}
    plan = StepPlan(step_id=7, scheduler_incarnation=1, sequences=(sequence,), **moves)
    with pytest.raises(ValueError, match=rule):
        check_plan(plan, **bounds, num_slots=2)
    check_plan(StepPlan(step_id=7, scheduler_incarnation=1, sequences=(sequence,)), **bounds)
