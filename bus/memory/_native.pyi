"""Atomics, futexes, doorbells, cells and copies over shared memory.

`buf` is anything with a contiguous buffer (mmap, memoryview, bytearray, array); offsets are bytes from its
start. Errors of every call: IndexError (range outside the buffer), ValueError (unaligned offset, value
outside the word), BufferError (a store into a read-only buffer), TypeError. Nothing was touched then.
Durations are nanoseconds >= 0. Waits release the GIL and run Python signal handlers when interrupted.
"""

from typing import Any, TypeAlias

import numpy.typing as npt
from typing_extensions import Buffer as _Buffer

from bus.clock import Deadline

# The stubs of NumPy do not declare arrays as buffers before Python 3.12.
Buffer: TypeAlias = _Buffer | npt.NDArray[Any]

def load_u32(buf: Buffer, offset: int, /) -> int:
    """Acquire load."""

def load_u64(buf: Buffer, offset: int, /) -> int:
    """Acquire load."""

def store_u32(buf: Buffer, offset: int, value: int, /) -> None:
    """Release store."""

def store_u64(buf: Buffer, offset: int, value: int, /) -> None:
    """Release store."""

def fetch_add_u32(buf: Buffer, offset: int, delta: int, /) -> int:
    """Add, wrapping, sequentially consistent; return the old value."""

def fetch_add_u64(buf: Buffer, offset: int, delta: int, /) -> int:
    """Add, wrapping, sequentially consistent; return the old value."""

def cas_u32(buf: Buffer, offset: int, expected: int, desired: int, /) -> bool:
    """Compare and swap, sequentially consistent; tell whether it swapped."""

def futex_wait(buf: Buffer, offset: int, expected: int, timeout_ns: int, /) -> bool:
    """Sleep while the u32 equals `expected`. True: woken (may be spurious) or it differs; False: timeout."""

def futex_wake(buf: Buffer, offset: int, count: int, /) -> int:
    """Wake up to `count` sleepers of the u32, in any process; return how many."""

def wait_u32(buf: Buffer, offset: int, expected: int, spin_ns: int, timeout_ns: int, /) -> int:
    """Spin up to `spin_ns`, then sleep, until the u32 differs; return its value (`expected` = timed out).

    The writer must `futex_wake` after its store; use a doorbell where it should do so only if someone sleeps.
    """

def ring_doorbell(buf: Buffer, offset: int, /) -> int:
    """Increment `seq` at `offset`, wake all sleepers if `sleepers` at `offset + 4` is nonzero; return seq."""

def sound_alarm(buf: Buffer, offset: int, /) -> None:
    """Increment `alarm` at `offset + 16`, then ring the doorbell at `offset`; also patient waiters are woken."""

def wait_doorbell(buf: Buffer, offset: int, seen: int, spin_ns: int, timeout_ns: int, /) -> int:
    """Spin up to `spin_ns`, then sleep, until `seq` differs from `seen`; return it (`seen` = timed out)."""

def write_cell(buf: Buffer, offset: int, w0: int, w1: int, w2: int, w3: int, /) -> None:
    """Publish four u64 at a 32-byte aligned offset; `w0` is the sequence word.

    One writer. NOTE: `w0` must be nonzero and differ from the previous one, or a reader cannot see that the
    cell changed under it.
    """

def read_cell(buf: Buffer, offset: int, /) -> tuple[int, int, int, int] | None:
    """Return a consistent copy of the cell; None when it is empty (`w0` = 0) or being written."""

def read_memory(pid: int, address: int, out: Buffer, /) -> None:
    """Fill `out` from another process's memory. OSError: there is no such process or range, or it may not be read."""

def copy(dst: Buffer, dst_offset: int, src: Buffer, src_offset: int, num_bytes: int, /) -> None:
    """Copy bytes; overlapping ranges behave like memmove. Releases the GIL from 16 KiB on."""

def bench_compute(num_steps: int, /) -> int:
    """Return the nanoseconds that a chain of so many multiplications takes. Releases the GIL."""

def bench_meet(
    buf: Buffer, offset: int, side: int, num_steps: int, first: int, durations: Buffer, timeout_ns: int, /
) -> bool:
    """Compute `num_steps`, then await the other side, spinning, for each element of `durations`; False = it is silent.

    Args:
        buf: shared; [offset, offset + 256) holds both flags, 128-byte aligned.
        side: 0 or 1.
        first: how many rounds were played on these flags before.
        durations: u64 per round, filled with nanoseconds.
        timeout_ns: for all rounds together.

    Raises:
        ValueError: a buffer is too small or unaligned.
    """

def bench_pingpong(
    buf: Buffer,
    offset: int,
    side: int,
    private: Buffer,
    first_round: int,
    durations: Buffer,
    timeout_ns: int,
    is_rewritten: bool,
    /,
) -> bool:
    """Play one side of a spinning ping-pong in C: the limit that point-to-point is measured against.

    Args:
        buf: shared, [offset, offset + 4096 + two blocks), 128-byte aligned; a block is `private` rounded up to a page.
        side: 0 begins, 1 answers.
        private: the message, copied in and out; its length is the message's.
        first_round: >= 1; a round uses two numbers from it on, larger than any used before on these flags.
        durations: u64 per round, filled with nanoseconds from the side's turn to its end.
        timeout_ns: False is returned when the other side is silent for so long.
    """

class _LinkEnd:
    """What both ends of a point-to-point link have. Wrapped by bus/xccl/channel.py; see `P2p` for meaning and errors.

    Subclasses provide `_poll(event_id) -> error or None`, `_renew(event_id, deadline)` and
    `_error(kind, text, event_id) -> error`; a `RecvEnd` also `_allocate(code, shape)` and
    `_refuse(event_id, tag, extension, out)`. RuntimeError: closed, or used by two threads at once.
    """

    is_retired: bool

    @property
    def num_messages(self) -> int:
        """Messages, or parts of them, that went through."""

    @property
    def num_bytes(self) -> int:
        """Their bytes."""

    @property
    def num_chunks(self) -> int:
        """Records."""

    @property
    def num_pulled(self) -> int:
        """Parts that did not go through the ring."""

    @property
    def num_waits(self) -> int:
        """Waits for the other side."""

    @property
    def num_pause_wins(self) -> int:
        """Waits that ended while polling with the core held."""

    @property
    def num_yield_wins(self) -> int:
        """Waits that ended while polling with the core given away."""

    @property
    def num_sleeps(self) -> int:
        """Sleeps in the kernel."""

    @property
    def num_lane_blocks(self) -> int:
        """Blocks of large arrays that other lanes than the calling thread copied."""

    @property
    def num_shared_bytes(self) -> int:
        """Bytes of large arrays that the sender wrote while the receiver read the rest."""

    @property
    def num_moves(self) -> int:
        """Moves to the core of the other end."""

    def _open(
        self,
        own: Buffer,
        peer: Buffer,
        *,
        ring_offset: int,
        num_slots: int,
        slot_bytes: int,
        out_cell: int,
        in_cell: int,
        own_bell: int,
        peer_bell: int,
        incarnation: int,
        peer_incarnation: int,
        own_app: tuple[int, int],
        peer_app: tuple[int, int],
        pull_bytes_min: int,
        message_bytes_max: int,
        read_bytes_min: int,
        shared_bytes_min: int,
        poll_ns: int,
        pause_rounds: int,
        yield_ns: int,
        may_sleep: bool,
        copy_lanes: int,
        own_place: int,
        peer_place: int,
        is_first: bool,
    ) -> None:
        """Begin, or begin again, on two mappings. ValueError if an offset is outside them."""

    def _wait(self, event_id: int, deadline: Deadline, /) -> bool:
        """Wait until the other side writes its cell; False at the deadline."""

    def _abandon(self) -> bool:
        """Forget the message under way; tell whether there was one."""

    def _close(self) -> None:
        """Let both mappings go."""

class SendEnd(_LinkEnd):
    """The sending end."""

    @property
    def tail(self) -> int:
        """One past the last pushed slot."""

    @property
    def slot_bytes(self) -> int:
        """Payload bytes of a slot."""

    def send(self, array: npt.NDArray[Any], event_id: int, deadline: Deadline, /) -> None:
        """Send and wait until it was taken."""

    def _send_part(
        self, array: npt.NDArray[Any], event_id: int, deadline: Deadline, num_more: int, is_first: bool, /
    ) -> None:
        """Push one part; wait for the acknowledgement after the last."""

    def _start(self, array: npt.NDArray[Any] | None, event_id: int, deadline: Deadline, /) -> None:
        """Prepare a message for `_advance`."""

    def _advance(self) -> bool:
        """Push what fits; tell whether the whole message is pushed."""

    def _drops(self, event_id: int, /) -> int:
        """Return how many messages the receiver has given up half-way, as far as it has told."""

    def _taken(self, tail: int, event_id: int, drops_before: int, /) -> bool:
        """Tell whether the message that ended at `tail` was taken. PeerStalled: it was given up."""

    def await_taken(self, tail: int, event_id: int, deadline: Deadline, /) -> None:
        """Wait until the message that ended at `tail` was taken. PeerDied, PeerStalled."""

    def reserve(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, event_id: int, deadline: Deadline, /
    ) -> npt.NDArray[Any]:
        """Return an array that lies in the next free slot; wait while there is none. ValueError: it does not fit."""

    def commit(self, event_id: int, /) -> int:
        """Publish what was reserved; return the tail at its end. Does not wait. RuntimeError: nothing is reserved."""

    def _claim(self, event_id: int, deadline: Deadline, /) -> int | None:
        """Return the offset of the free slot's payload in the peer's segment; None while the ring is full."""

    def _publish(self, tag: bytes, num_bytes: int, event_id: int, /) -> None:
        """Publish the claimed slot as a whole message."""

class RecvEnd(_LinkEnd):
    """The receiving end."""

    @property
    def head(self) -> int:
        """The next slot to read."""

    @property
    def num_drops(self) -> int:
        """Times that left-overs of a message given up half-way were skipped."""

    def recv(self, out: npt.NDArray[Any] | None, event_id: int, deadline: Deadline, /) -> npt.NDArray[Any]:
        """Receive into `out`, or a new array."""

    def _recv_part(
        self, out: npt.NDArray[Any] | None, event_id: int, deadline: Deadline, is_first: bool, /
    ) -> tuple[npt.NDArray[Any], int] | None:
        """Receive one part; return it and how many follow. None: the sender gave up, begin again."""

    def _advance(
        self, out: npt.NDArray[Any] | None, event_id: int, deadline: Deadline, /
    ) -> npt.NDArray[Any] | None:
        """Take what has arrived; return the array once it is whole."""

    def peek(self, event_id: int, deadline: Deadline, /) -> npt.NDArray[Any]:
        """Wait for the next message and return it in place, read only. ValueError: it does not lie in one place."""

    def release(self, event_id: int, /) -> None:
        """Consume the message that was peeked at; its sender may go on. RuntimeError: there is none."""

    def _look(self, event_id: int, deadline: Deadline, /) -> tuple[int, bytes, bytes] | None:
        """Return event id, tag and extension of the next message, or None. Never waits."""
