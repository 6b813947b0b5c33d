"""The rows of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Batch:
    """T token rows of S sequences, in any order and mixture of prefill and decode.

    Args:
        token_ids: [T] int64.
        positions: [T] int32, absolute positions in their sequences. The KV of all earlier positions is in the
            cache already or is computed by another row of this batch.
        seq_of_row: [T] int32, row of `block_tables`.
        block_tables: [S, max_blocks] int32, block ids of each sequence in order; unused entries are not read.
        block_tokens: token slots per block.

    Raises:
        ValueError: an array has another type or shape.
    """

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int32]
    seq_of_row: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]
    block_tokens: int

    def __post_init__(self) -> None:
        num_rows = len(self.token_ids)
        _check("token_ids", self.token_ids, np.int64, (num_rows,))
        _check("positions", self.positions, np.int32, (num_rows,))
        _check("seq_of_row", self.seq_of_row, np.int32, (num_rows,))
        _check("block_tables", self.block_tables, np.int32, self.block_tables.shape[:2])
        if self.block_tables.ndim != 2 or self.block_tokens < 1:
            raise ValueError("block_tables must have rank 2 and block_tokens must be positive")

    @property
    def num_rows(self) -> int:
        """Return T."""
        return len(self.token_ids)


def _check(name: str, array: npt.NDArray[Any], dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        wanted = f"C-contiguous {np.dtype(dtype).name} of shape {list(shape)}"
        raise ValueError(f"{name} must be {wanted}, got {array.dtype.name} of shape {list(array.shape)}")
