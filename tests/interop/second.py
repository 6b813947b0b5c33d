"""A second implementation of the bus, after bus/README.md: segments, cells, doorbells, rings.

Nothing of `bus` is imported; what a peer needs to know is in that page, or the page has a gap. The other
second_*.py build on this file.

Memory order without fences. A shared word is read and written through `memoryview.cast("Q")` or `("I")`, whose
items CPython copies with a memcpy of constant size, which is one move instruction; the native `struct` formats
do the same, the ones with "<" or ">" go byte by byte and must not be used here. Between two such accesses lie
hundreds of instructions in other translation units, so no compiler moves them past each other; and x86 keeps
loads in order, stores in order, and a store behind earlier loads. So a plain load is an acquire and a plain
store a release, which is all that cells and rings ask for. One thing x86 does reorder: a load may overtake an
earlier store. Only the doorbell needs that order, and there every addition is made by the kernel: FUTEX_WAKE_OP
adds to a word with a locked instruction, which is also the full fence. Two counters of a doorbell have several
writers, and an addition by load and store would lose theirs. On other machines none of this holds: `SOUND` is
False there, and the tests are skipped.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

SOUND = platform.machine() == "x86_64" and platform.python_implementation() == "CPython"

MAGIC = int.from_bytes(b"XDSSEG\r\n", "little")
VERSION = 1
PAGE = 4096
CELL = 64
SEQ, SLEEPERS, PATIENT, WAKE_AT, HEARTBEAT, READY = 128, 132, 136, 140, 256, 384
HEADER = struct.Struct("=QII16sIIQ")  # up to byte 48
AREAS = struct.Struct("=7Q")
COUNTER_BITS = 40
POLL_S = 0.005

_SYS_FUTEX = 202  # x86_64
_WAIT, _WAKE_OP = 0, 5
_OP_ADD, _CMP_EQ = 1, 0
_INT_MAX = 2**31 - 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class BusError(Exception):
    """What went wrong between two ranks; `name` is the word of the README's table."""

    name = "BusError"


class PeerDied(BusError):
    """The peer's owner lock is free."""

    name = "PeerDied"


class PeerStalled(BusError):
    """The deadline passed, or the peer gave a message up."""

    name = "PeerStalled"


class EventMismatch(BusError):
    """The next message carries another event id, and stays; or a rank has moved on to a later event."""

    name = "EventMismatch"


class SegmentCorrupt(BusError):
    """Shared bytes are impossible."""

    name = "SegmentCorrupt"


class Cell(NamedTuple):
    """A consistent copy of a cell."""

    w0: int
    w1: int
    w2: int
    w3: int


@dataclass(frozen=True)
class Areas:
    """Offsets and sizes of a segment's parts, in bytes; in the header's order."""

    cells_offset: int
    num_cells: int
    managed_offset: int
    managed_bytes: int
    app_offset: int
    app_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, num_cells: int, managed_bytes: int, app_bytes: int) -> Areas:
        """Lay the areas one after another, each start and the total rounded up to a page."""
        managed = round_up(PAGE + num_cells * CELL, PAGE)
        app = round_up(managed + managed_bytes, PAGE)
        total = round_up(app + app_bytes, PAGE)
        return cls(PAGE, num_cells, managed, managed_bytes, app, app_bytes, total)


def round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is at least `value`."""
    return -(-value // unit) * unit


def stamp(incarnation: int, count: int) -> int:
    """Return the w0 of a cell's `count`-th write."""
    return int((incarnation % 2**24) << COUNTER_BITS | count % 2**COUNTER_BITS)


def _lock(kind: int) -> bytes:
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)


class Segment:
    """A mapped segment: the own one (`create`) or a peer's (`attach`)."""

    def __init__(self, name: str, fd: int, is_owner: bool) -> None:
        self.name, self.fd, self.is_owner = name, fd, is_owner
        self.map = mmap.mmap(fd, os.fstat(fd).st_size)
        self.bytes = memoryview(self.map)
        self.u64 = self.bytes.cast("Q")
        self.u32 = self.bytes.cast("I")
        self._pin = ctypes.c_char.from_buffer(self.map)
        self._address = ctypes.addressof(self._pin)
        self.areas = Areas(*AREAS.unpack_from(self.bytes, 64))

    # ------------------------------------------------------------------ life

    @classmethod
    def create(
        cls, name: str, areas: Areas, *, service: str, index: int, incarnation: int, num_lanes: int
    ) -> Segment:
        """Create, lock, size, map, write the header, and publish it with `ready`."""
        path = Path(f"/dev/shm{name}")
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK))
            if path.exists() and path.stat().st_ino == os.fstat(fd).st_ino:
                break
            os.close(fd)  # a sweeper was faster
        os.ftruncate(fd, areas.total_bytes)
        own = cls(name, fd, is_owner=True)
        HEADER.pack_into(own.bytes, 0, MAGIC, VERSION, PAGE, service.encode(), index, num_lanes, incarnation)
        AREAS.pack_into(own.bytes, 64, *vars(areas).values())
        own.areas = areas
        own.u32[READY // 4] = 1
        return own

    @classmethod
    def attach(cls, name: str) -> Segment:
        """Map a peer's segment. FileNotFoundError: not there yet; SegmentCorrupt: not a segment."""
        fd = os.open(f"/dev/shm{name}", os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if size == 0:
                raise FileNotFoundError(name)
            head = os.pread(fd, PAGE, 0)
            if len(head) < PAGE:
                raise SegmentCorrupt(f"{name}: {size} bytes")
            if struct.unpack_from("=I", head, READY)[0] == 0:
                raise FileNotFoundError(name)
            check_header(name, head, size)
        except BaseException:
            os.close(fd)
            raise
        return cls(name, fd, is_owner=False)

    def close(self) -> None:
        """Unmap; the owner also removes the name and gives its lock up."""
        if self.is_owner:
            Path(f"/dev/shm{self.name}").unlink()
        del self._pin
        for view in (self.u64, self.u32, self.bytes):
            view.release()
        self.map.close()
        os.close(self.fd)

    def owner_alive(self) -> bool:
        """Ask whether somebody holds the owner lock; takes nothing."""
        answer = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK))
        return bool(struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK)

    @property
    def incarnation(self) -> int:
        """The incarnation that owns it."""
        return self.u64[5]

    @property
    def num_lanes(self) -> int:
        """Cells per peer."""
        return self.u32[9]

    def beat(self) -> None:
        """Vouch for the owner's loop."""
        self.u64[HEARTBEAT // 8] = time.monotonic_ns()

    # ------------------------------------------------------------------ cells

    def cell_offset(self, slot: int, lane: int) -> int:
        """Return where the cell of (peer slot, lane) begins."""
        return self.areas.cells_offset + (slot * self.num_lanes + lane) * CELL

    def write_cell(self, offset: int, w0: int, w1: int, w2: int, w3: int) -> None:
        """Publish four words: w0 = 0, the others, then w0."""
        at, words = offset // 8, self.u64
        words[at] = 0
        words[at + 1] = w1
        words[at + 2] = w2
        words[at + 3] = w3
        words[at] = w0

    def read_cell(self, offset: int) -> Cell | None:
        """Return a consistent copy, None when the cell is empty or being written."""
        at, words = offset // 8, self.u64
        w0 = words[at]
        cell = Cell(w0, words[at + 1], words[at + 2], words[at + 3])
        return cell if w0 != 0 and words[at] == w0 else None

    # ------------------------------------------------------------------ doorbell

    def _add(self, offset: int, amount: int, wake: int) -> None:
        operation = _OP_ADD << 28 | _CMP_EQ << 24 | (amount & 0xFFF) << 12
        at = ctypes.c_void_p(self._address + offset)
        self._futex(at, _WAKE_OP, wake, ctypes.c_void_p(0), at, operation)

    def _futex(self, *args: object) -> int:
        result = int(_libc.syscall(ctypes.c_long(_SYS_FUTEX), *args))
        return result if result >= 0 else -ctypes.get_errno()

    def seq(self) -> int:
        """Return the doorbell's count; read it before looking for work."""
        return self.u32[SEQ // 4]

    def ring(self) -> None:
        """Add 1 to seq and wake whoever sleeps: one system call, which wakes even if `sleepers` is 0."""
        self._add(SEQ, 1, _INT_MAX)

    def fence(self) -> None:
        """Order all before and all behind it (seq_cst): an addition of 0 is a locked instruction too."""
        self._add(SLEEPERS, 0, 0)

    def ring_sleepers(self) -> None:
        """Ring where somebody is marked as asleep; a fence lies between the cells and this."""
        if self.u32[SLEEPERS // 4] != 0:
            self.ring()

    def sleep_unless(self, look: Callable[[], T | None], timeout_s: float) -> tuple[T | None, bool]:
        """Mark a sleeper, then return what `look` finds; if nothing, wait for a ring. Also whether there was either.

        The mark is a fence too: a peer that rings for sleepers only sees it, or `look` sees what that peer has written.
        """
        self._add(SLEEPERS, 1, 0)
        try:
            seen = self.seq()
            found = look()
            return found, found is not None or self._sleep_until(lambda seq: seq != seen, timeout_s)
        finally:
            self._add(SLEEPERS, -1, 0)

    def sleep_for(self, num_missing: Callable[[], int], timeout_s: float) -> bool:
        """Wait as one for whom only sleepers are rung: mark, read seq, look again, be patient. False: time is over."""
        self._add(SLEEPERS, 1, 0)  # which is the fence as well
        try:
            seen = self.seq()
            missing = num_missing()
            if missing == 0:
                return True
            self.u32[WAKE_AT // 4] = (seen + missing) % 2**32
            self.u32[PATIENT // 4] = 1
            try:
                return self._sleep_until(lambda seq: (seq - seen) % 2**32 >= missing, timeout_s)
            finally:
                self.u32[PATIENT // 4] = 0
        finally:
            self._add(SLEEPERS, -1, 0)

    def _sleep_until(self, is_over: Callable[[int], bool], timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        at = ctypes.c_void_p(self._address + SEQ)
        while not is_over(seq := self.seq()):
            left = until - time.monotonic()
            if left <= 0:
                return False
            timeout = (ctypes.c_long * 2)(int(left), int(left % 1 * 1e9))
            self._futex(at, _WAIT, ctypes.c_uint(seq), timeout, ctypes.c_void_p(0), 0)
        return True


def check_header(name: str, head: bytes, file_bytes: int) -> None:
    """Refuse what is not a segment of this layout. SegmentCorrupt names the field."""
    magic, version, header_bytes, *_ = HEADER.unpack_from(head)
    areas = Areas(*AREAS.unpack_from(head, 64))
    expected = Areas.of(areas.num_cells, areas.managed_bytes, areas.app_bytes)
    for what, given, wanted in (
        ("magic", magic, MAGIC),
        ("layout version", version, VERSION),
        ("header bytes", header_bytes, PAGE),
        ("areas", areas, expected),
        ("total_bytes", areas.total_bytes, file_bytes),
    ):
        if given != wanted:
            raise SegmentCorrupt(f"{name}: {what} is {given}, not {wanted}")


def wait_for(own: Segment, peer: Segment, look: Callable[[], T | None], deadline_s: float, what: str) -> T:
    """Return what `look` finds, sleeping on the own doorbell between two looks.

    PeerDied when the peer's owner lock is free and a last look finds nothing; PeerStalled at the deadline.
    """
    while True:
        found = look()
        if found is not None:
            return found
        own.beat()
        found, is_news = own.sleep_unless(look, POLL_S)
        if found is not None:
            return found
        if is_news:
            continue
        if not peer.owner_alive():
            found = look()
            if found is None:
                raise PeerDied(what)
            return found
        if time.monotonic() > deadline_s:
            raise PeerStalled(what)
