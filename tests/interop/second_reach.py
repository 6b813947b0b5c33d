"""Messages of the second implementation that are read in the sender's memory, after bus/README.md.

Proofs, records of kind 4, and, as a sender, helping with the copy. `OFFERED` to `WITHDRAWN`: the state of an offer.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from pathlib import Path

from tests.interop.second import PeerStalled, Segment, SegmentCorrupt
from tests.interop.second_p2p import ACK, DATA, READ, Array, Receiver, Sender, is_from, pack_tag, stamp

BEHIND = 32  # of the data or ack cell
OFFERED, TAKEN, WITHDRAWN = range(3)
STATE, INVITED, TARGET, SHARES, HELPED = 8, 12, 16, 24, 32  # offsets in the payload
SHARABLE_BYTES = 40
UNIT = 4096
SHARE_MIN, SHARE_MAX = 16 * 1024 // UNIT, 512 * 1024 // UNIT
LOOK_S = 0.001  # after which the sender makes sure again whom it writes to

_libc = ctypes.CDLL(None, use_errno=True)


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _move(name: str, pid: int, pairs: list[tuple[int, int, int]]) -> None:
    """Call process_vm_readv or _writev for (own address, other's address, bytes). OSError."""
    own = (_Span * len(pairs))(*[_Span(here, size) for here, _, size in pairs])
    others = (_Span * len(pairs))(*[_Span(there, size) for _, there, size in pairs])
    call, num = getattr(_libc, name), ctypes.c_ulong(len(pairs))
    call.restype = ctypes.c_ssize_t
    done = call(pid, own, num, others, num, ctypes.c_ulong(0))
    if done != sum(size for *_, size in pairs):
        raise OSError(ctypes.get_errno() or 14, f"{name}: {done}")


def read_u64(pid: int, address: int) -> int:
    """Return a word of a process. OSError."""
    word = ctypes.c_uint64()
    _move("process_vm_readv", pid, [(ctypes.addressof(word), address, 8)])
    return word.value


class Atomics:
    """Compare and swap on words of a segment, which the compiler's runtime library has as functions."""

    def __init__(self, segment: Segment) -> None:
        self._library = ctypes.CDLL("libatomic.so.1")
        self._segment = segment
        self._pin = ctypes.c_char.from_buffer(segment.map)
        self._base = ctypes.addressof(self._pin)

    def swap(self, size: int, offset: int, old: int, new: int) -> bool:
        """Replace `old` by `new`; False where something else was found."""
        kind = {4: ctypes.c_uint32, 8: ctypes.c_uint64}[size]
        call = getattr(self._library, f"__atomic_compare_exchange_{size}")
        call.restype = ctypes.c_bool
        seq_cst = 5
        at = ctypes.c_void_p(self._base + offset)
        return bool(call(at, ctypes.byref(kind(old)), kind(new), seq_cst, seq_cst))

    def close(self) -> None:
        """Let go of the mapping."""
        del self._pin


class ReadSender(Sender):
    """A sender whose arrays are read where they are, once the receiver has proved that it can."""

    def __init__(self, own: Segment, peer: Segment, own_slot: int, peer_slot: int, deadline_s: float) -> None:
        super().__init__(own, peer, own_slot, peer_slot, deadline_s)
        self._nonce = ctypes.c_uint64(int.from_bytes(os.urandom(8), "little"))
        self._proof = own.cell_offset(peer_slot, ACK) + BEHIND
        self._atomics = Atomics(peer)
        self.num_helped = 0
        words = os.getpid(), ctypes.addressof(self._nonce), 0
        offer = peer.cell_offset(own_slot, DATA) + BEHIND
        peer.write_cell(offer, stamp(own.incarnation, 1), *words)

    def has_proof(self) -> bool:
        """Whether the receiver has read the nonce."""
        cell = self._own.read_cell(self._proof)
        return cell is not None and is_from(cell, self._peer.incarnation) and cell.w1 == self._nonce.value

    def send_read(self, array: Array, event_id: int, deadline_s: float) -> None:
        """Send an array of which only the address goes through the ring; help to copy it if invited."""
        assert self.has_proof()
        data = ctypes.create_string_buffer(array.data, len(array.data))
        tag, rest = pack_tag(array, READ, 0)
        at = self._ring.record_at(self._tail) + 64 + len(rest)
        payload = struct.pack("=Q32x", ctypes.addressof(data))
        self._push(event_id, 0, tag, rest + payload, deadline_s)
        try:
            self._help(at, ctypes.addressof(data), len(array.data), deadline_s)
            self._await_ack(deadline_s)
        except PeerStalled:
            if self._atomics.swap(4, at + STATE, OFFERED, WITHDRAWN):
                raise

    def _help(self, at: int, source: int, num_bytes: int, deadline_s: float) -> None:
        """Write shares from the back until nothing is left, or the message is taken without our help."""
        while self._peer.u32[(at + INVITED) // 4] == 0:
            if self._acked()[0] >= self._tail or time.monotonic() > deadline_s:
                return
        target, has_claimed, sure_until = self._peer.u64[(at + TARGET) // 8], False, 0.0
        while (share := self._claim(at + SHARES, sure_until)) is not None:
            first, behind, sure_until = share
            begin, size = first * UNIT, min(behind * UNIT, num_bytes) - first * UNIT
            _move("process_vm_writev", self._reader(), [(source + begin, target + begin, size)])
            has_claimed = True
        if has_claimed:
            self.num_helped += 1
            self._peer.u32[(at + HELPED) // 4] = 1
            self._peer.ring()

    def _reader(self) -> int:
        cell = self._own.read_cell(self._proof)
        assert cell is not None
        return cell.w2

    def _claim(self, offset: int, sure_until: float) -> tuple[int, int, float] | None:
        """Return the units [first, behind) that are ours now, and how long it is sure whom we write to."""
        while True:
            shares = self._peer.u64[offset // 8]
            front, back = shares % 2**32, shares >> 32
            if front >= back:
                return None
            now = time.monotonic()
            if now > sure_until:
                cell = self._own.read_cell(self._proof)
                if cell is None or cell.w2 == 0 or read_u64(cell.w2, cell.w3) != self._nonce.value:
                    return None
                sure_until = now + LOOK_S
            taken = min(back - front, max(SHARE_MIN, min(SHARE_MAX, (back - front) // 3)))
            if self._atomics.swap(8, offset, shares, back - taken << 32 | front):
                return back - taken, back, sure_until

    def close(self) -> None:
        """Let go of the mapping."""
        self._atomics.close()


class ReadReceiver(Receiver):
    """A receiver that reads arrays in the sender's memory."""

    def __init__(
        self,
        own: Segment,
        peer: Segment,
        own_slot: int,
        peer_slot: int,
        *,
        ring_offset: int,
        num_slots: int,
        slot_bytes: int,
    ) -> None:
        self._offer = own.cell_offset(peer_slot, DATA) + BEHIND
        self._proof = peer.cell_offset(own_slot, ACK) + BEHIND
        self._kept = ctypes.c_uint64()
        self._atomics = Atomics(own)
        self._proofs = self.num_read = 0
        super().__init__(
            own,
            peer,
            own_slot,
            peer_slot,
            ring_offset=ring_offset,
            num_slots=num_slots,
            slot_bytes=slot_bytes,
        )

    def prove(self) -> None:
        """Show the sender the nonce that it keeps in its own memory, once for each that it offers."""
        cell = self._own.read_cell(self._offer)
        if cell is None or not is_from(cell, self._peer.incarnation):
            return
        try:
            nonce = read_u64(cell.w1, cell.w2)
        except OSError:
            return
        if nonce != self._kept.value:
            self._kept.value = nonce
            self._proofs += 1
            word = stamp(self._own.incarnation, self._proofs)
            self._peer.write_cell(self._proof, word, nonce, os.getpid(), ctypes.addressof(self._kept))

    def _look_for_record(self) -> bool | None:
        self.prove()
        return super()._look_for_record()

    def _far_bytes(self, kind: int, pointer: bytearray, num_bytes: int) -> bytearray:
        if kind != READ:
            return super()._far_bytes(kind, pointer[:8], num_bytes)
        offer = self._own.read_cell(self._offer)
        if offer is None or len(pointer) not in (16, SHARABLE_BYTES):
            raise SegmentCorrupt(f"{len(pointer)} bytes of a place to read")
        (address,) = struct.unpack_from("=Q", pointer)
        data, nonce = ctypes.create_string_buffer(max(1, num_bytes)), ctypes.c_uint64()
        pairs = [(ctypes.addressof(data), address, num_bytes), (ctypes.addressof(nonce), offer.w2, 8)]
        try:
            _move("process_vm_readv", offer.w1, pairs)
        except OSError as error:
            raise SegmentCorrupt(f"{num_bytes} bytes at {address:#x}: {error}") from error
        if nonce.value != self._kept.value:
            raise SegmentCorrupt("another process has the sender's id")
        at = self._ring.record_at(self._head) + 64 + self._payload_bytes() - len(pointer)
        if not self._atomics.swap(4, at + STATE, OFFERED, TAKEN):
            raise PeerStalled("withdrawn while it was read")
        self.num_read += 1
        return bytearray(data.raw[:num_bytes])

    def _payload_bytes(self) -> int:
        (num_bytes,) = struct.unpack_from("=I", self._own.bytes, self._ring.record_at(self._head) + 8)
        return int(num_bytes)

    def close(self) -> None:
        """Let go of the mapping."""
        self._atomics.close()


def is_possible() -> bool:
    """Whether this system has what is needed here."""
    try:
        ctypes.CDLL("libatomic.so.1")
    except OSError:
        return False
    return Path("/proc/self").exists() and hasattr(_libc, "process_vm_readv")
