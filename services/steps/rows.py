"""The rows of a step, and whether a plan keeps its bounds.

Theory: a step plan is self-contained, so whoever computes it keeps no request state between steps. A step's rows are
the planned tokens of all sequences, one after the other; only the rows that sample, or whose prompt log-probabilities
are wanted, go through the output head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bus.control.messages import PlannedSequence, StepPlan

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step plan as arrays: T rows over S sequences.

    token_ids [T] int64, positions [T] int32, seq_of_row [T] int32, block_tables [S, blocks_max] int32 (-1 padded),
    logit_rows [R] int64: the rows whose logits are needed, ascending.
    """

    token_ids: Int64Array
    positions: Int32Array
    seq_of_row: Int32Array
    block_tables: Int32Array
    logit_rows: Int64Array

    @property
    def num_rows(self) -> int:
        """T, the number of tokens computed in this step."""
        return int(self.token_ids.shape[0])


def lay_out(plan: StepPlan) -> StepRows:
    """Return the rows of `plan`, sequence by sequence in plan order."""
    sequences = plan.sequences
    counts = [len(s.token_ids) for s in sequences]
    token_ids = np.fromiter((t for s in sequences for t in s.token_ids), np.int64, sum(counts))
    ranges = [np.arange(s.start, s.start + n, dtype=np.int32) for s, n in zip(sequences, counts, strict=True)]
    tables = np.full((len(sequences), max(len(s.block_table) for s in sequences)), -1, np.int32)
    for i, sequence in enumerate(sequences):
        tables[i, : len(sequence.block_table)] = sequence.block_table
    return StepRows(
        token_ids=token_ids,
        positions=np.concatenate(ranges),
        seq_of_row=np.repeat(np.arange(len(sequences), dtype=np.int32), counts),
        block_tables=tables,
        logit_rows=_logit_rows(sequences, counts),
    )


def _logit_rows(sequences: Sequence[PlannedSequence], counts: Sequence[int]) -> Int64Array:
    rows: list[int] = []
    first = 0
    for sequence, count in zip(sequences, counts, strict=True):
        num_prompt_rows = len(sequence.next_prompt_token_ids)
        rows.extend(range(first, first + num_prompt_rows))
        last = first + count - 1
        if sequence.sample and num_prompt_rows < count:
            rows.append(last)
        first += count
    return np.asarray(rows, np.int64)


def check_plan(
    plan: StepPlan, *, rows_max: int, num_blocks: int, block_tokens: int, vocab_size: int, num_slots: int = 0
) -> None:
    """Raise ValueError, naming request, field, value and rule, if `plan` would read or write out of bounds.

    `num_slots` is that of the host file.
    """
    _check_moves(plan, num_blocks, num_slots)
    num_rows = 0
    for s in plan.sequences:
        num_rows += len(s.token_ids)
        where = f"step {plan.step_id} request {s.request_id}"
        if not s.token_ids:
            raise ValueError(f"{where}: token_ids must not be empty")
        if min(s.token_ids) < 0 or max(s.token_ids) >= vocab_size:
            raise ValueError(f"{where}: token_ids must be in 0..{vocab_size - 1}")
        if s.start < 0 or s.start + len(s.token_ids) > len(s.block_table) * block_tokens:
            raise ValueError(f"{where}: {len(s.block_table)} blocks do not hold positions from {s.start}")
        if min(s.block_table) < 0 or max(s.block_table) >= num_blocks:
            raise ValueError(f"{where}: block ids must be in 0..{num_blocks - 1}")
        if len(s.next_prompt_token_ids) > len(s.token_ids):
            raise ValueError(f"{where}: more next_prompt_token_ids than token_ids")
        if s.sample and s.sampling is None:
            raise ValueError(f"{where}: a sequence that samples needs sampling parameters")
    if not 0 < num_rows <= rows_max:
        raise ValueError(f"step {plan.step_id}: {num_rows} rows must be in 1..{rows_max}")


def _check_moves(plan: StepPlan, num_blocks: int, num_slots: int) -> None:
    moved = {
        "stores": (plan.stores, num_blocks, num_slots),
        "loads": (plan.loads, num_slots, num_blocks),
        "copies": (plan.copies, num_blocks, num_blocks),
    }
    for name, (pairs, num_from, num_to) in moved.items():
        for source, target in pairs:
            if not (0 <= source < num_from and 0 <= target < num_to):
                rule = f"must be below {num_from} and {num_to}, not negative"
                raise ValueError(f"step {plan.step_id}: {name} ({source}, {target}): {rule}")
