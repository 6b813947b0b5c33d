from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from bus.clock import now_ns
from bus.errors import ResourceError, SegmentCorrupt
from bus.memory import ofd, segment, shm
from bus.memory.layout import AREAS_OFFSET, READY_OFFSET, SegmentLayout
from bus.memory.segment import Segment, check_memory, segment_name, segment_prefix, sweep, total_bytes

LAYOUT = SegmentLayout(8, 10_000, 5_000, num_lanes=2)


def create(pod: str, incarnation: int = 1, layout: SegmentLayout = LAYOUT) -> Segment:
    name = segment_name(pod, "expert", 3, incarnation)
    return Segment.create(name, layout, service="expert", index=3, incarnation=incarnation)


def path_of(name: str) -> Path:
    return Path("/dev/shm") / name[1:]


def test_peers_see_the_owners_bytes_and_the_owner_sees_theirs(pod: str) -> None:
    owner = create(pod)
    peer = Segment.attach(owner.name)
    assert (str(peer.identity), peer.incarnation, peer.layout) == ("expert-3.1", 1, LAYOUT)
    peer.app[:3] = b"abc"
    owner.managed[-1] = 7
    assert bytes(owner.app[:3]) == b"abc"
    assert peer.managed[-1] == 7
    assert (len(owner.managed), len(owner.app)) == (10_000, 5_000)
    peer.close()
    owner.close()
    owner.unlink()


def test_only_the_user_may_open_it(pod: str) -> None:
    owner = create(pod)
    assert stat.S_IMODE(path_of(owner.name).stat().st_mode) == 0o600
    assert path_of(owner.name).stat().st_size == LAYOUT.total_bytes
    owner.close()


def test_a_taken_name_is_refused_and_left_alone(pod: str) -> None:
    owner = create(pod)
    with pytest.raises(FileExistsError, match=owner.name):
        create(pod)
    assert Segment.attach(owner.name).owner_alive()
    owner.close()


def test_the_owner_lock_is_held_until_close(pod: str) -> None:
    owner = create(pod)
    peer = Segment.attach(owner.name)
    assert owner.owner_alive()
    assert peer.owner_alive()
    view = owner.array(LAYOUT.app_offset, (4,), np.float32)
    owner.close()
    assert not peer.owner_alive(), "a view that still exists must not keep the lock"
    assert not owner.owner_alive()
    view[:] = 3
    assert bytes(peer.app[:4]) == np.float32(3).tobytes()
    peer.close()
    assert not peer.owner_alive()


def test_a_peer_that_closes_does_not_end_the_owner(pod: str) -> None:
    owner = create(pod)
    Segment.attach(owner.name).close()
    assert Segment.attach(owner.name).owner_alive()
    owner.close()


def test_close_and_unlink_are_idempotent(pod: str) -> None:
    owner = create(pod)
    for _ in range(2):
        owner.close()
        owner.unlink()
    assert owner.closed
    with pytest.raises(FileNotFoundError, match=owner.name):
        Segment.attach(owner.name)


def test_array_views_the_mapping(pod: str) -> None:
    owner = create(pod)
    view = owner.array(LAYOUT.managed_offset + 8, (2, 3), "<f8")
    view[1, 2] = 1.5
    assert owner.array(LAYOUT.managed_offset + 8 + 40, (1,), np.float64)[0] == 1.5
    assert owner.array(LAYOUT.total_bytes, (0, 5), np.float32).shape == (0, 5)
    owner.close()


def test_array_refuses_what_does_not_fit(pod: str) -> None:
    owner = create(pod)
    total = LAYOUT.total_bytes
    for offset, shape in ((-8, (1,)), (total, (1,)), (total - 8, (3,)), (0, (2**40, 2**40)), (0, (total,))):
        with pytest.raises(IndexError, match="outside"):
            owner.array(offset, shape, np.float32)
    with pytest.raises(ValueError, match="negative"):
        owner.array(0, (-1, -1), np.float32)
    with pytest.raises(ValueError, match="aligned"):
        owner.array(4, (1,), np.float64)
    with pytest.raises(ValueError, match="shared memory"):
        owner.array(0, (1,), object)
    owner.close()


def test_doorbell_and_heartbeat(pod: str) -> None:
    owner = create(pod)
    peer = Segment.attach(owner.name)
    seen = owner.doorbell_seq()
    assert owner.wait_doorbell(seen, 0, 1_000_000) == seen
    assert peer.ring_doorbell() == seen + 1
    assert owner.wait_doorbell(seen, 0, 10**10) == seen + 1
    before_ns = now_ns()
    owner.beat()
    assert before_ns <= peer.heartbeat_ns() <= now_ns()
    owner.close()


def test_an_unpublished_segment_is_not_there_yet(pod: str) -> None:
    name = segment_name(pod, "expert", 0, 1)
    path_of(name).touch(0o600)
    with pytest.raises(FileNotFoundError, match="not published"):
        Segment.attach(name)
    os.truncate(path_of(name), LAYOUT.total_bytes)
    with pytest.raises(FileNotFoundError, match="not published"):
        Segment.attach(name)
    assert sweep(segment_prefix(pod)) == [], "it may be under construction"
    os.utime(path_of(name), (0, 0))
    assert sweep(segment_prefix(pod)) == [name]


@pytest.mark.parametrize("num_bytes", [100, 4096, LAYOUT.total_bytes - 1, LAYOUT.total_bytes + 4096])
def test_a_file_of_another_size_is_corrupt(pod: str, num_bytes: int) -> None:
    owner = create(pod)
    os.truncate(path_of(owner.name), num_bytes)
    with pytest.raises(SegmentCorrupt, match=owner.name):
        Segment.attach(owner.name)
    owner.unlink()
    owner.close()


@pytest.mark.parametrize("offset", [0, 8, 12, 16, AREAS_OFFSET, AREAS_OFFSET + 24, READY_OFFSET])
def test_a_damaged_header_is_corrupt(pod: str, offset: int) -> None:
    owner = create(pod)
    owner.buf[offset : offset + 4] = b"\0\xff\0\xff"
    with pytest.raises(SegmentCorrupt, match=owner.name):
        Segment.attach(owner.name)
    owner.close()


def test_sweep_removes_only_what_has_no_living_owner(pod: str) -> None:
    living, dead = create(pod, 1), create(pod, 2)
    dead.close()
    assert total_bytes(segment_prefix(pod)) == 2 * LAYOUT.total_bytes
    assert sweep(segment_prefix(pod)) == [dead.name]
    assert sweep(segment_prefix(pod)) == []
    assert living.owner_alive()
    assert total_bytes(segment_prefix(pod)) == LAYOUT.total_bytes
    living.close()


def test_sweep_and_total_touch_no_foreign_names(pod: str) -> None:
    for prefix in ("/", "", "/foreign-", "xds-"):
        with pytest.raises(ValueError, match="prefix"):
            sweep(prefix)
        with pytest.raises(ValueError, match="prefix"):
            total_bytes(prefix)


def test_a_name_taken_over_by_a_new_file_is_not_swept(pod: str) -> None:
    """The sweeper opened the dead segment, then the name was removed and created again."""
    dead = create(pod, 1)
    dead.close()
    fd = shm.open_existing(dead.name)
    dead.unlink()
    living = create(pod, 1)
    assert ofd.try_lock(fd)
    assert not shm.names_file(dead.name, fd)
    os.close(fd)
    assert sweep(segment_prefix(pod)) == []
    living.close()


def test_a_creator_survives_a_sweeper_that_holds_the_lock(pod: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [False, True]
    real_try_lock = ofd.try_lock
    monkeypatch.setattr(ofd, "try_lock", lambda fd: outcomes.pop(0) and real_try_lock(fd))
    owner = create(pod)
    assert outcomes == []
    assert Segment.attach(owner.name).owner_alive()
    owner.close()


def test_creation_that_never_gets_the_lock_is_given_up(pod: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ofd, "try_lock", lambda fd: False)
    with pytest.raises(ResourceError, match="owner lock"):
        create(pod)
    assert total_bytes(segment_prefix(pod)) == 0


def test_a_refused_mapping_leaves_nothing(pod: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment.os, "ftruncate", refuse)
    with pytest.raises(ResourceError, match="No space left"):
        create(pod)
    assert total_bytes(segment_prefix(pod)) == 0


@pytest.mark.parametrize("name", ["xds-a", "/foreign", "/xds-", "/xds-a/b", "/xds-" + "a" * 300, "/xds-é"])
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="segment name"):
        Segment.attach(name)
    with pytest.raises(ValueError, match="segment name"):
        Segment.create(name, LAYOUT, service="expert", index=0, incarnation=1)


@pytest.mark.parametrize("pod_name", ["", "a/b", "-a", "a b", "x" * 65, "é"])
def test_pod_names_are_checked(pod_name: str) -> None:
    with pytest.raises(ValueError, match="pod"):
        segment_name(pod_name, "expert", 0, 1)


def test_memory_is_checked_before_anything_is_created() -> None:
    check_memory(4096, 8192, bytes_held=4096)
    with pytest.raises(ResourceError, match=r"4097 bytes needed.*shared_bytes_max 8192"):
        check_memory(4097, 8192, bytes_held=4096)
    with pytest.raises(ResourceError, match="OOM killer"):
        check_memory(2**60, 2**61)
