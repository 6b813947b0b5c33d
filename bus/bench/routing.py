"""What all ways share: the inputs of a shape, who owns an expert, and what the result must be.

Rank r's tokens, experts and weights are drawn from a generator seeded with r and the shape, so every process knows
everybody's. An expert on rank r multiplies its rows by r + 1, so the result tells whether each row went to the rank
that owns the expert and came back to its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

DISPATCH, A2E = "dispatch + combine", "A2E + E2A"
FLOAT32_TOLERANCE, INT8_TOLERANCE = 1e-5, 0.03  # of the largest value of the result


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """An MoE-shaped exchange.

    form: DISPATCH (every rank holds tokens and experts) or A2E (the first half of the ranks holds tokens, the second
    experts). batch: tokens of a rank that holds any. kind: float32 or int8 rows on the wire.
    """

    form: str
    num_ranks: int
    batch: int
    hidden: int
    top_k: int
    kind: str
    num_experts: int

    @property
    def first_expert_rank(self) -> int:
        """The first rank that holds experts."""
        return self.num_ranks // 2 if self.form == A2E else 0

    @property
    def num_expert_ranks(self) -> int:
        """Ranks that hold experts."""
        return self.num_ranks - self.first_expert_rank

    @property
    def num_local_experts(self) -> int:
        """Experts of a rank that holds any."""
        return self.num_experts // self.num_expert_ranks

    def num_tokens(self, rank: int) -> int:
        """Return how many tokens `rank` holds."""
        return self.batch if self.form == DISPATCH or rank < self.first_expert_rank else 0

    @property
    def rows_max(self) -> int:
        """Largest number of rows that one rank can receive."""
        sources = sum(1 for rank in range(self.num_ranks) if self.num_tokens(rank))
        return sources * self.batch * self.top_k


@dataclass(frozen=True, slots=True)
class Inputs:
    """x: [num_tokens, hidden]. topk_idx: [num_tokens, top_k], distinct experts. topk_weights: the same shape."""

    x: Float32Array
    topk_idx: Int32Array
    topk_weights: Float32Array


def inputs(shape: Shape, rank: int) -> Inputs:
    """Return what `rank` holds."""
    num = shape.num_tokens(rank)
    rng = np.random.default_rng((rank, shape.batch, shape.hidden, shape.top_k))
    x = rng.standard_normal((num, shape.hidden), np.float32)
    idx = np.argsort(rng.random((num, shape.num_experts)), axis=1)[:, : shape.top_k]
    return Inputs(x, np.ascontiguousarray(idx, np.int32), rng.random(idx.shape, np.float32))


def expert_factor(rank: int) -> np.float32:
    """Return by what the experts of `rank` multiply."""
    return np.float32(rank + 1)


def expected(shape: Shape, given: Inputs) -> Float32Array:
    """Return the sum over slots of weight * expert(row) that an exchange without rounding gives."""
    owner = shape.first_expert_rank + given.topk_idx // shape.num_local_experts
    scale = (given.topk_weights * (owner + 1)).sum(axis=1, keepdims=True)
    found: Float32Array = (given.x * scale).astype(np.float32)
    return found


def check_result(shape: Shape, given: Inputs, out: Float32Array) -> None:
    """Raise ValueError unless `out` is the expected result within what the kind rounds."""
    wanted = expected(shape, given)
    if not wanted.size:
        return
    largest = float(np.abs(wanted).max())
    error = float(np.abs(out - wanted).max()) / largest
    tolerance = INT8_TOLERANCE if shape.kind == "int8" else FLOAT32_TOLERANCE
    if not error <= tolerance:
        raise ValueError(f"wrong result: off by {error:.2g} of the largest value, {tolerance:g} allowed")
