"""What an expert worker computes, in which order.

Theory: an expert worker is a function of what has arrived. All pairs (row, expert) that wait are grouped by (layer,
expert), so that rows of several attention workers share one pass over an expert's weights: how many rows meet at an
expert decides the speed of a small product far more than how the product is written. Because every product is
row-independent, grouping changes no bit of any row.

Pure: no clock, no process, no shared memory. Invariant of `group_pairs`: every pair stands in exactly one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PairGroup:
    """Pairs of one expert of one layer. `source[i]`, `pair[i]`: arrival index and pair index within it."""

    layer: int
    expert: int
    source: Int32Array
    pair: Int64Array


def group_pairs(layers: Sequence[int], pair_experts: Sequence[Int32Array]) -> list[PairGroup]:
    """Group the pairs of all arrivals by (layer, expert), ascending.

    Args:
        layers: layer of each arrival. pair_experts: [num_pairs] int32 expert ids of each arrival.
    """
    groups = []
    for layer in sorted(set(layers)):
        sources = [i for i, other in enumerate(layers) if other == layer]
        experts = np.concatenate([pair_experts[i] for i in sources])
        source = np.concatenate([np.full(pair_experts[i].shape[0], i, np.int32) for i in sources])
        pair = np.concatenate([np.arange(pair_experts[i].shape[0]) for i in sources])
        order = np.argsort(experts, kind="stable")
        bounds = np.flatnonzero(np.diff(experts[order], prepend=-1, append=-1))
        for begin, end in pairwise(bounds):
            chosen = order[begin:end]
            groups.append(PairGroup(layer, int(experts[chosen[0]]), source[chosen], pair[chosen]))
    return groups
