"""How well a checkpoint predicts text, and how fast it does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.model import numerics
from services.model.reference import ReferenceModel
from services.quantize.text import Ids


@dataclass(frozen=True, slots=True)
class Quality:
    """perplexity: e^(mean loss in nats per token). weight_bytes: held in memory. tokens_per_s: of this evaluation."""

    perplexity: float
    weight_bytes: int
    tokens_per_s: float


def evaluate(
    folder: Path, token_ids: Ids, *, kv_cache_dtype: str = "auto", wire_int8: bool = False
) -> Quality:
    """Predict every token of windows [n, length] from those before it in its window.

    `kv_cache_dtype` and `wire_int8` say in which form the model runs, see `ReferenceModel.load`.

    Raises:
        ConfigError: the checkpoint. ValueError: windows of fewer than two tokens.
    """
    if token_ids.shape[1] < 2:
        raise ValueError(f"windows of {token_ids.shape[1]} tokens must have at least 2")
    model = ReferenceModel.load(folder, kv_cache_dtype=kv_cache_dtype, wire_int8=wire_int8)
    losses = []
    began = time.perf_counter()
    for window in token_ids:
        logits = model.logits(window.tolist())
        losses += [
            -numerics.log_softmax(row)[target] for row, target in zip(logits[:-1], window[1:], strict=True)
        ]
    spent = time.perf_counter() - began
    held = model.attention.weights.held_bytes + model.experts.weights.held_bytes
    return Quality(float(np.exp(np.mean(losses))), held, token_ids.size / spent)
