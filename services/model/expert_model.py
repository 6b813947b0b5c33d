"""The expert worker's half of the model: some experts of every MoE layer, over mapped weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bus.errors import ConfigError
from services.model.checkpoint import Checkpoint, Progress, Weights
from services.model.mlp import ExpertTensors, Mlp, shared_prefix, shared_specs
from services.model.model_config import ModelConfig

Float = npt.NDArray[np.float32]


class ExpertModel:
    """Experts by (layer, expert id). The shared expert's id is `config.num_experts`."""

    def __init__(self, config: ModelConfig, weights: Weights, experts: dict[tuple[int, int], Mlp]) -> None:
        self.config = config
        self.weights = weights
        self._experts = experts

    @classmethod
    def load(
        cls,
        folder: str | Path,
        config: ModelConfig,
        expert_ids: Sequence[int],
        shared: bool,
        progress: Progress | None = None,
    ) -> ExpertModel:
        """Map some experts, the same ids in every MoE layer.

        Args:
            folder: the checkpoint.
            config: from `load_config` of the same folder.
            expert_ids: routed experts, 0 .. num_experts - 1.
            shared: also the shared expert, which the model must have.
            progress: called with (tensors mapped, tensors in total).

        Raises:
            ConfigError: an id does not exist, or the checkpoint is damaged or does not fit the config.
        """
        for expert_id in expert_ids:
            if not 0 <= expert_id < config.num_experts:
                raise ConfigError(f"expert id {expert_id}: must be in 0 .. {config.num_experts - 1}")
        if shared and not config.has_shared_expert:
            raise ConfigError(f"{folder}: the model has no shared expert")
        checkpoint = Checkpoint.open(folder, config.quantization)
        layers = {index: ExpertTensors(config, index, checkpoint) for index in config.moe_layer_indices}
        specs = [
            spec for layer in layers.values() for expert_id in expert_ids for spec in layer.specs(expert_id)
        ]
        if shared:
            specs += [spec for i in layers for spec in shared_specs(config, i)]
        weights = checkpoint.load(specs, progress)
        experts = {(i, e): layer.take(weights, e) for i, layer in layers.items() for e in expert_ids}
        if shared:
            experts |= {
                (i, config.num_experts): Mlp.from_weights(weights, shared_prefix(config, i)) for i in layers
            }
        return cls(config, weights, experts)

    def forward(self, layer_idx: int, expert_id: int, x: Float, out: Float | None = None) -> Float:
        """Return y [n, hidden] of one expert for rows x [n, hidden], unweighted.

        `out` may be given, e.g. a view of shared memory with contiguous rows; it must not overlap x.

        Raises:
            KeyError: this process does not hold that expert of that layer.
        """
        return self._experts[layer_idx, expert_id].forward(x, out)
