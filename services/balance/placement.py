"""Expert placement: which expert worker holds which logical expert.

Theory: every process derives the same map from the configuration, so no message is needed to agree on it. Routed
experts are spread contiguously (neighbouring tensors of a checkpoint then make one mapping). The shared expert is a
logical expert like the others, numbered after the routed ones; every worker holds it, and rows take turns over the
workers, so that it never makes one worker hot. Row-independent products make every choice give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


def owned_experts(num_experts: int, num_expert_workers: int, ep_rank: int) -> range:
    """Return the routed experts of one expert worker: contiguous, sizes differing by at most one."""
    first = ep_rank * num_experts // num_expert_workers
    return range(first, (ep_rank + 1) * num_experts // num_expert_workers)


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Logical expert -> expert rank. `owner` is [num_experts] int32; `version` grows with every change."""

    owner: Int32Array
    num_expert_ranks: int
    has_shared_expert: bool
    version: int = 0

    @classmethod
    def contiguous(cls, num_experts: int, num_expert_ranks: int, *, has_shared_expert: bool) -> ExpertMap:
        """Spread `num_experts` over the ranks; a dense model has 0, and every rank its shared expert.

        Raises:
            ValueError: a rank would be left without an expert.
        """
        if num_expert_ranks > num_experts and (num_experts or not has_shared_expert):
            raise ValueError(f"expert_workers={num_expert_ranks} must be at most num_experts={num_experts}")
        owner = np.empty(num_experts, np.int32)
        for rank in range(num_expert_ranks):
            owner[list(owned_experts(num_experts, num_expert_ranks, rank))] = rank
        return cls(owner, num_expert_ranks, has_shared_expert)

    @property
    def num_experts(self) -> int:
        """Number of routed experts; also the id of the shared expert."""
        return int(self.owner.shape[0])

    def slots(self, topk_idx: Int32Array, first_rank: int) -> tuple[Int32Array, Int32Array]:
        """Return the expert ids of all slots and the ranks to send them to.

        Args:
            topk_idx: [num_tokens, top_k] int32 routed experts.
            first_rank: where the rotation of the shared expert starts (any number; groups and steps should differ).

        Returns:
            (slot_expert, slot_rank), both [num_tokens, num_slots] int32; the shared expert is the last slot.
        """
        slot_rank = self.owner[topk_idx]
        if not self.has_shared_expert:
            return topk_idx, slot_rank
        num_tokens = topk_idx.shape[0]
        shared = np.full((num_tokens, 1), self.num_experts, np.int32)
        turn = (first_rank + np.arange(num_tokens, dtype=np.int32)) % self.num_expert_ranks
        return np.hstack((topk_idx, shared)), np.hstack((slot_rank, turn[:, None].astype(np.int32)))
