"""The gate: which experts a row visits, and with what weight.

Softmax scores (qwen3_moe), or sigmoid scores (deepseek_v3, kimi_k2, glm4_moe, minimax_m2) with a learned correction
bias that takes part in the choice only and, optionally, a first choice among groups of experts. Best first; a tie goes
to the lower expert id.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.model import numerics
from services.model.checkpoint import TensorSpec, Weights
from services.model.model_config import ModelConfig


class Router:
    """The gate of one layer."""

    def __init__(self, config: ModelConfig, layer_idx: int, weights: Weights) -> None:
        prefix, names = f"model.layers.{layer_idx}.{config.names.mlp}", config.names
        self._config = config
        self.weight = weights.array(f"{prefix}.{names.gate}")
        self._correction_bias = weights.optional_vector(f"{prefix}.{names.correction_bias}")
        if self._correction_bias is None and config.scoring == "sigmoid":
            self._correction_bias = np.zeros(config.num_experts, dtype=np.float32)

    @staticmethod
    def specs(config: ModelConfig, layer_idx: int) -> list[TensorSpec]:
        """Return the tensors of one layer's gate."""
        prefix, names = f"model.layers.{layer_idx}.{config.names.mlp}", config.names
        specs = [TensorSpec(f"{prefix}.{names.gate}", (config.num_experts, config.hidden_size))]
        if config.gate_correction_bias:
            specs.append(TensorSpec(f"{prefix}.{names.correction_bias}", (config.num_experts,)))
        return specs

    def logits(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return [T, num_experts] of rows x [T, hidden], before scores and biases."""
        return numerics.matmul_nt(x, self.weight)

    def route(self, x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return (topk_idx [T, top_k] int32, topk_weights [T, top_k] float32) of rows x [T, hidden]."""
        config = self._config
        return numerics.route(
            self.logits(x),
            top_k=config.top_k,
            correction_bias=self._correction_bias,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )
