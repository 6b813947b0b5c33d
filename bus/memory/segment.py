"""A segment: one named piece of POSIX shared memory that one process owns and its peers map.

Life cycle: 1. `create` makes the file exclusively (0600), takes the owner lock, sizes and maps it, writes
the header and last the `ready` word. 2. Peers `attach` by name, which checks every header field against the
real file. 3. `close` frees the owner lock and the mapping; `unlink` removes the name. 4. If the owner died
in between, the kernel freed its lock: peers see `owner_alive() == False`, and whoever starts or stops next
removes the name with `sweep`. A dead owner's segment is never repaired or taken over: the next incarnation
creates its own.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bus.clock import now_ns
from bus.errors import ResourceError, SegmentCorrupt
from bus.memory import _native, ofd, shm
from bus.memory.deaths import deaths
from bus.memory.layout import (
    ALARM_OFFSET,
    AREAS_OFFSET,
    DOORBELL_OFFSET,
    HEADER_BYTES,
    HEADER_USED_BYTES,
    HEARTBEAT_OFFSET,
    IDENTITY_OFFSET,
    READY,
    READY_OFFSET,
    SegmentIdentity,
    SegmentLayout,
    pack_identity,
    parse_header,
)

NAME_PREFIX = "/xds-"
NAME_PATTERN = re.compile(r"/xds-[A-Za-z0-9_.-]{1,200}")
POD_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
UNFINISHED_GRACE_S = 2.0  # a segment without a header may be one that is being created right now

Scalar = TypeVar("Scalar", bound=np.generic)


def segment_name(pod: str, service: str, index: int, incarnation: int) -> str:
    """Return the name of one incarnation's segment, e.g. `/xds-pod-expert-3-17`."""
    identity = SegmentIdentity(service, index, incarnation)
    return f"{segment_prefix(pod)}{identity.service}-{identity.index}-{identity.incarnation}"


def segment_prefix(pod: str) -> str:
    """Return what all segment names of a pod begin with."""
    if not POD_PATTERN.fullmatch(pod):
        raise ValueError(f"pod: {pod!r} must match {POD_PATTERN.pattern}")
    return f"{NAME_PREFIX}{pod}-"


def _check_name(name: str) -> None:
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"segment name: {name!r} must match {NAME_PATTERN.pattern}")


def _corrupt(name: str, text: str) -> SegmentCorrupt:
    return SegmentCorrupt(f"segment {name}: {text}", rank="-", peer=name)


class Segment:
    """A mapped segment; made by `create` or `attach`, never directly.

    Attributes:
        name: POSIX name with its leading slash.
        identity: service, index and incarnation of the owner.
        layout: where everything is.
        buf: the writable mapping, `layout.total_bytes` long.
        is_owner: whether this object holds the owner lock.

    Threads: any, except that `close` must not race with other calls.
    """

    def __init__(
        self, fd: int, name: str, identity: SegmentIdentity, layout: SegmentLayout, *, is_owner: bool
    ) -> None:
        self._fd = fd
        self.name = name
        self.identity = identity
        self.layout = layout
        self.is_owner = is_owner
        self.buf = mmap.mmap(fd, layout.total_bytes)

    @classmethod
    def create(
        cls, name: str, layout: SegmentLayout, *, service: str, index: int, incarnation: int
    ) -> Segment:
        """Create, lock, size, map and publish a segment; its bytes are zero.

        Raises:
            FileExistsError: the name is taken.
            ValueError: name, service, index or incarnation breaks its rule.
            ResourceError: the system refused to size or map it; the name was removed again.
        """
        _check_name(name)
        identity = SegmentIdentity(service, index, incarnation)
        fd = shm.open_locked(name)
        try:
            os.ftruncate(fd, layout.total_bytes)
            segment = cls(fd, name, identity, layout, is_owner=True)
        except (OSError, ValueError) as error:
            shm.unlink(name)
            os.close(fd)
            raise ResourceError(
                f"segment {name}: cannot size or map {layout.total_bytes} bytes: {error}"
            ) from error
        header = pack_identity(identity, layout)
        segment.buf[IDENTITY_OFFSET : IDENTITY_OFFSET + len(header)] = header
        areas = layout.pack_areas()
        segment.buf[AREAS_OFFSET : AREAS_OFFSET + len(areas)] = areas
        segment.beat()
        _native.store_u32(segment.buf, READY_OFFSET, READY)  # SYNC: word (publishes the header)
        deaths.subscribe(segment)
        return segment

    @classmethod
    def attach(cls, name: str) -> Segment:
        """Map another process's segment after checking its header. Does not check that the owner lives.

        Raises:
            FileNotFoundError: there is no such segment, or its owner has not published it yet.
            SegmentCorrupt: magic, version, sizes, or the file's real size are wrong.
        """
        _check_name(name)
        fd = shm.open_existing(name)
        try:
            identity, layout = _read_header(fd, name)
            segment = cls(fd, name, identity, layout, is_owner=False)
        except BaseException:
            os.close(fd)
            raise
        deaths.watch(segment)
        return segment

    @property
    def incarnation(self) -> int:
        """The owner's incarnation."""
        return self.identity.incarnation

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd < 0

    @property
    def managed(self) -> memoryview:
        """The managed area, writable."""
        layout = self.layout
        return memoryview(self.buf)[layout.managed_offset : layout.managed_offset + layout.managed_bytes]

    @property
    def app(self) -> memoryview:
        """The app area, writable."""
        layout = self.layout
        return memoryview(self.buf)[layout.app_offset : layout.app_offset + layout.app_bytes]

    def owner_alive(self) -> bool:
        """Tell whether the owner lock is held. One system call; False after `close`."""
        return not self.closed and (self.is_owner or ofd.is_locked(self._fd))

    def cell_offset(self, peer: int, lane: int = 0) -> int:
        """Return the offset in `buf` of the cell that `peer` writes on `lane`; IndexError if none."""
        return self.layout.cell_offset(peer, lane)

    def array(
        self, offset: int, shape: tuple[int, ...], dtype: type[Scalar] | np.dtype[Scalar]
    ) -> npt.NDArray[Scalar]:
        """Return a NumPy view of the mapping; it stays valid until the view is dropped, even after `close`.

        Args:
            offset: bytes from the start of the segment, a multiple of the dtype's item size.
            shape: of the view, C order.
            dtype: any without Python objects.

        Raises:
            ValueError: negative dimension, unaligned offset, or a dtype with objects.
            IndexError: the view would leave the segment.
        """
        kind = np.dtype(dtype)
        if kind.hasobject or kind.itemsize == 0:
            raise ValueError(f"dtype: {kind} cannot live in shared memory")
        if any(length < 0 for length in shape):
            raise ValueError(f"shape: {shape} has a negative dimension")
        num_bytes = math.prod(shape) * kind.itemsize
        if offset < 0 or offset + num_bytes > self.layout.total_bytes:
            raise IndexError(
                f"offset: {offset} + {num_bytes} bytes is outside {self.layout.total_bytes} bytes"
            )
        if offset % kind.alignment:
            raise ValueError(f"offset: {offset} is not aligned to {kind.alignment} bytes for {kind}")
        # NOTE: only `frombuffer` keeps the mapping exported as long as the array lives. With
        # `np.ndarray(buffer=...)` `close` would unmap the pages under a living array.
        flat = np.frombuffer(self.buf, dtype=kind, count=math.prod(shape), offset=offset)
        return flat.reshape(shape)

    def ring_doorbell(self) -> int:
        """Increment the segment's `seq` and wake its owner if it sleeps; return the new seq."""
        return _native.ring_doorbell(self.buf, DOORBELL_OFFSET)

    def doorbell_seq(self) -> int:
        """Return the current seq: read it, look for work, and if there is none wait with it as `seen`."""
        return _native.load_u32(self.buf, DOORBELL_OFFSET)

    def wait_doorbell(self, seen: int, spin_ns: int, timeout_ns: int) -> int:
        """Wait until `seq` differs from `seen`; return it (`seen` = timed out). Releases the GIL."""
        return _native.wait_doorbell(self.buf, DOORBELL_OFFSET, seen, spin_ns, timeout_ns)

    def sound_alarm(self) -> None:
        """Count one more death that the owner was told of, and wake the waiters: they look at their peers' locks."""
        _native.sound_alarm(self.buf, DOORBELL_OFFSET)

    def num_alarms(self) -> int:
        """Return how often the alarm was sounded, mod 2^32."""
        return _native.load_u32(self.buf, ALARM_OFFSET)

    def fileno(self) -> int:
        """Return the descriptor of the file; -1 after `close`."""
        return self._fd

    def beat(self) -> None:
        """Store the current monotonic time in the heartbeat word; called by the loop that it vouches for."""
        _native.store_u64(self.buf, HEARTBEAT_OFFSET, now_ns())

    def heartbeat_ns(self) -> int:
        """Return the owner's last heartbeat, monotonic nanoseconds."""
        return _native.load_u64(self.buf, HEARTBEAT_OFFSET)

    def close(self) -> None:
        """Free the owner lock and the mapping; idempotent. Views that still exist keep the memory alive."""
        if self.closed:
            return
        if self.is_owner:
            deaths.unsubscribe(self)
        else:
            deaths.unwatch(self)
        fd, self._fd = self._fd, -1
        if self.is_owner:
            ofd.unlock(fd)  # explicit: the mapping holds a second descriptor of the same open file
            os.fchmod(
                fd, 0o600
            )  # changes nothing, and tells whoever watches the file: views may keep it open
        os.close(fd)
        with contextlib.suppress(BufferError):  # exported views; the last of them frees the mapping
            self.buf.close()

    def unlink(self) -> None:
        """Remove the name; idempotent. Mappings stay valid."""
        shm.unlink(self.name)


def _read_header(fd: int, name: str) -> tuple[SegmentIdentity, SegmentLayout]:
    file_bytes = os.fstat(fd).st_size
    if file_bytes == 0:
        raise FileNotFoundError(f"segment {name} is not published yet")
    if file_bytes < HEADER_BYTES:
        raise _corrupt(name, f"file of {file_bytes} bytes is shorter than a header")
    with mmap.mmap(fd, HEADER_BYTES) as header:
        ready = _native.load_u32(header, READY_OFFSET)  # SYNC: word
        if ready == 0:
            raise FileNotFoundError(f"segment {name} is not published yet")
        if ready != READY:
            raise _corrupt(name, f"ready: {ready} must be {READY}")
        try:
            identity, layout = parse_header(header[:HEADER_USED_BYTES])
        except ValueError as error:
            raise _corrupt(name, str(error)) from error
    if layout.total_bytes != file_bytes:
        raise _corrupt(name, f"header says {layout.total_bytes} bytes, the file has {file_bytes}")
    return identity, layout


def _names(prefix: str) -> Iterator[str]:
    if not prefix.startswith(NAME_PREFIX):
        raise ValueError(f"prefix: {prefix!r} must begin with {NAME_PREFIX!r}")
    for name in sorted(f"/{path.name}" for path in shm.SHM_DIR.iterdir()):
        if name.startswith(prefix) and NAME_PATTERN.fullmatch(name):
            yield name


def sweep(prefix: str) -> list[str]:
    """Remove the segments under `prefix` (see `segment_prefix`) whose owner has ended; return their names.

    Segments of living owners, of other users, and unpublished ones younger than `UNFINISHED_GRACE_S` stay.
    """
    return [name for name in _names(prefix) if _sweep_one(name)]


def _sweep_one(name: str) -> bool:
    try:
        fd = shm.open_existing(name)
    except (FileNotFoundError, PermissionError):
        return False
    try:
        # The name may lead to a newer file by now; with the lock in hand no creator can take this one.
        if not ofd.try_lock(fd) or not shm.names_file(name, fd) or _is_unfinished(fd):
            return False
        shm.unlink(name)
        return True
    finally:
        os.close(fd)


def _is_unfinished(fd: int) -> bool:
    status = os.fstat(fd)
    # File times are wall-clock; a clock step only makes one orphan stay until the next sweep.
    if time.time() - status.st_mtime >= UNFINISHED_GRACE_S:
        return False
    if status.st_size < HEADER_BYTES:
        return True
    return os.pread(fd, 4, READY_OFFSET) == bytes(4)


def total_bytes(prefix: str) -> int:
    """Return the sum of the sizes of all segments under `prefix`, living or not."""
    total = 0
    for name in _names(prefix):
        with contextlib.suppress(FileNotFoundError):
            status = (shm.SHM_DIR / name[1:]).stat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def check_memory(bytes_needed: int, shared_bytes_max: int, *, bytes_held: int = 0) -> None:
    """Refuse to create segments that the machine or the configuration cannot hold.

    Args:
        bytes_needed: what is about to be created.
        shared_bytes_max: the configured bound of the pod.
        bytes_held: what the pod has already (`total_bytes`).

    Raises:
        ResourceError: names what is needed, what there is, and the rule.
    """
    available = _available_bytes()
    file_system = os.statvfs(shm.SHM_DIR)
    free = file_system.f_bavail * file_system.f_frsize
    text = (
        f"shared memory: {bytes_needed} bytes needed, {bytes_held} held, "
        f"xccl.shared_bytes_max {shared_bytes_max}, MemAvailable {available}, {shm.SHM_DIR} free {free}"
    )
    if bytes_needed + bytes_held > shared_bytes_max:
        raise ResourceError(f"{text}; needed + held must not exceed shared_bytes_max")
    if bytes_needed > min(available, free):
        raise ResourceError(
            f"{text}; needed must fit the last two, because over-allocating is not refused with ENOSPC: "
            "it wakes the OOM killer"
        )


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ResourceError("/proc/meminfo has no MemAvailable line")
