"""The gated MLP, as a dense layer, a routed expert or a shared expert: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.model import numerics
from services.model.checkpoint import Checkpoint, TensorSpec, Weights
from services.model.model_config import ModelConfig

Float = npt.NDArray[np.float32]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Mlp:
    """Three mapped matrices: gate and up [I, hidden], down [hidden, I]."""

    gate: numerics.AnyWeight
    up: numerics.AnyWeight
    down: numerics.AnyWeight

    @classmethod
    def from_weights(cls, weights: Weights, prefix: str, names: tuple[str, str, str] = PROJECTIONS) -> Mlp:
        """Take the three tensors under `prefix`."""
        return cls(*(weights.matrix(f"{prefix}.{name}.weight") for name in names))

    def forward(self, x: Float, out: Float | None = None) -> Float:
        """Return y [n, hidden] for x [n, hidden]."""
        return numerics.mlp(x, self.gate, self.up, self.down, out)


def mlp_specs(
    prefix: str, hidden_size: int, intermediate_size: int, names: tuple[str, str, str] = PROJECTIONS
) -> list[TensorSpec]:
    """Return the three tensors of an MLP stored by itself."""
    wide, narrow = (intermediate_size, hidden_size), (hidden_size, intermediate_size)
    shapes = (wide, wide, narrow)
    return [
        TensorSpec(f"{prefix}.{name}.weight", shape, quantisable=True)
        for name, shape in zip(names, shapes, strict=True)
    ]


def shared_prefix(config: ModelConfig, layer_idx: int) -> str:
    """Return where the shared expert of a layer is stored; in a dense model it is the layer's MLP."""
    prefix = f"model.layers.{layer_idx}.{config.names.mlp}"
    return f"{prefix}.{config.names.shared_expert}" if config.names.shared_expert else prefix


def shared_specs(config: ModelConfig, layer_idx: int) -> list[TensorSpec]:
    """Return the tensors of a layer's shared expert."""
    width = config.moe_intermediate_size * config.num_shared_experts
    return mlp_specs(shared_prefix(config, layer_idx), config.hidden_size, width)


class ExpertTensors:
    """Where the routed experts of one layer are stored: each by itself, or all stacked.

    The stacked layout is `experts.gate_up_proj` [E, 2 I, hidden] (gate rows first) and `experts.down_proj`
    [E, hidden, I].
    """

    def __init__(self, config: ModelConfig, layer_idx: int, checkpoint: Checkpoint) -> None:
        names = config.names
        self._prefix = f"model.layers.{layer_idx}.{names.mlp}.{names.experts}"
        self._names = names.projections
        self._hidden, self._intermediate = config.hidden_size, config.moe_intermediate_size
        self._stacked = f"{self._prefix}.gate_up_proj" in checkpoint

    def specs(self, expert_id: int) -> list[TensorSpec]:
        """Return the tensors of one expert."""
        hidden, intermediate = self._hidden, self._intermediate
        if not self._stacked:
            return mlp_specs(f"{self._prefix}.{expert_id}", hidden, intermediate, self._names)
        return [
            TensorSpec(f"{self._prefix}.gate_up_proj", (2 * intermediate, hidden), expert_id),
            TensorSpec(f"{self._prefix}.down_proj", (hidden, intermediate), expert_id),
        ]

    def take(self, weights: Weights, expert_id: int) -> Mlp:
        """Return one expert."""
        if not self._stacked:
            return Mlp.from_weights(weights, f"{self._prefix}.{expert_id}", self._names)
        gate_up = weights.array(f"{self._prefix}.gate_up_proj", expert_id)
        down = weights.array(f"{self._prefix}.down_proj", expert_id)
        return Mlp(gate_up[: self._intermediate], gate_up[self._intermediate :], down)
