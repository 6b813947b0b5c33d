"""Attention over a step that is much larger than usual, some rows at a time.

A prompt that is not to be chunked is one step, however long it is. Within a layer its rows are still taken in order
and in slices: each writes its KV before the next one reads it, so the bits are the same, memory stays small, and
whoever watches sees between two slices that the loop turns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from services.model.attention_model import AttentionModel, MoeInput
from services.model.batch import Batch
from services.model.kv_cache import KvCache

Float32Array = npt.NDArray[np.float32]

SLICE_ROWS = 512


def attend(
    model: AttentionModel,
    layer: int,
    hidden: Float32Array,
    batch: Batch,
    kv: KvCache,
    beat: Callable[[], None],
) -> tuple[Float32Array, MoeInput | None]:
    """Do what `AttentionModel.attend` does; `beat` is called before every slice but the first.

    The rows of each sequence must be in the order of their positions.
    """
    if batch.num_rows <= SLICE_ROWS:
        return model.attend(layer, hidden, batch, kv)
    parts = []
    for first in range(0, batch.num_rows, SLICE_ROWS):
        if first:
            beat()
        rows = slice(first, first + SLICE_ROWS)
        part = Batch(
            batch.token_ids[rows],
            batch.positions[rows],
            batch.seq_of_row[rows],
            batch.block_tables,
            batch.block_tokens,
        )
        parts.append(model.attend(layer, hidden[rows], part, kv))
    hidden = np.concatenate([part for part, _ in parts])
    inputs = [moe for _, moe in parts if moe is not None]
    if not inputs:
        return hidden, None
    return hidden, MoeInput(
        np.concatenate([moe.x for moe in inputs]),
        np.concatenate([moe.topk_idx for moe in inputs]),
        np.concatenate([moe.topk_weights for moe in inputs]),
    )
