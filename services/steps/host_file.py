"""The host tier's file: KV blocks that were evicted from the segment, by slot (paper section 6, RTC's tiers).

The file lies in the pod's runtime folder with mode 0600 and has no name any more once it is open: whatever ends this
process, the kernel frees it. A name that an earlier process left behind, dying in between, is removed at the start.
Its room is allocated at once, so a full disk is an error at the start and not in a step. Reads and writes are the
kernel's: with memory to spare they never reach the disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bus.errors import ResourceError

_PROBES = 8  # blocks that the measurement reads
_Transfer = Callable[[int, memoryview, int], int]  # (descriptor, memory, offset in the file) -> bytes moved


class HostFile:
    """`num_slots` slots of `block_bytes` bytes. Any I/O error is an OSError, after which contents are unknown."""

    def __init__(self, path: Path, *, num_slots: int, block_bytes: int) -> None:
        """Raises ResourceError when the file cannot be had."""
        self.num_slots, self.block_bytes = num_slots, block_bytes
        self._fd = -1
        try:
            path.unlink(missing_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            path.unlink()
            os.posix_fallocate(self._fd, 0, num_slots * block_bytes)
        except OSError as error:
            self.close()
            size = f"{num_slots * block_bytes} bytes for kv.host_tokens"
            raise ResourceError(f"{path}: {size}: {error.strerror}") from None

    def store(self, slot: int, block: npt.NDArray[np.float32]) -> None:
        """Write one C-contiguous block."""
        self._all_of(os.pwrite, block.data.cast("B"), slot)

    def load(self, slot: int, block: npt.NDArray[np.float32]) -> None:
        """Read one block into C-contiguous memory."""
        view = block.data.cast("B")
        self._all_of(lambda fd, rest, offset: os.preadv(fd, [rest], offset), view, slot)

    def bytes_per_s(self) -> int:
        """Measure reading; overwrites the first slots with zeros, so only before anything is stored."""
        block = np.zeros(self.block_bytes // 4, np.float32)
        num_probes = min(_PROBES, self.num_slots)
        for slot in range(num_probes):
            self.store(slot, block)
        started_ns = time.monotonic_ns()
        for slot in range(num_probes):
            self.load(slot, block)
        return num_probes * self.block_bytes * 1_000_000_000 // max(1, time.monotonic_ns() - started_ns)

    def close(self) -> None:
        """Give the room back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _all_of(self, transfer: _Transfer, view: memoryview, slot: int) -> None:
        offset = slot * self.block_bytes
        done = 0
        while done < self.block_bytes:
            num_bytes = transfer(self._fd, view[done:], offset + done)
            if num_bytes == 0:
                raise OSError(f"the file ends in slot {slot}")
            done += num_bytes
