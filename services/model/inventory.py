"""Does a checkpoint hold what `config.json` says, all of it and nothing else?

Every tensor must be one that the model needs, of the right shape and type, or one that this rule leaves out by name:

- `model.layers.N.*` with N from `num_hidden_layers` on, as many layers as `num_nextn_predict_layers` says: multi-token
  prediction, not served yet;
- `*.rotary_emb.inv_freq`: derived from the config;
- `lm_head.weight` when `tie_word_embeddings` is set.

Anything else would be computed without: a bias that `config.json` does not mention, a layer too many, another
architecture's part. Headers only; no weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bus.errors import ConfigError
from services.model.checkpoint import Checkpoint, TensorSpec
from services.model.mlp import ExpertTensors, shared_specs
from services.model.model_config import ModelConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def check_inventory(
    checkpoint: Checkpoint, config: ModelConfig, attention_specs: Sequence[TensorSpec]
) -> None:
    """Compare all headers with the config.

    Raises:
        ConfigError: names file, tensor and rule of what is missing, misshapen or unknown.
    """
    specs = [*attention_specs, *expert_specs(checkpoint, config)]
    known = {name for spec in specs for name in checkpoint.check(spec)}
    unknown = [name for name in checkpoint.tensors if name not in known and not _left_out(name, config)]
    if unknown:
        unknown.sort()
        stored = checkpoint.tensors[unknown[0]]
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{stored.path}: tensor {unknown[0]}{more}: not part of {config.model_type} with "
            f"num_hidden_layers = {config.num_hidden_layers} and num_nextn_predict_layers = "
            f"{config.num_mtp_layers} as config.json describes it; results would be wrong without it"
        )


def expert_specs(checkpoint: Checkpoint, config: ModelConfig) -> list[TensorSpec]:
    """Return the tensors of all experts of all layers."""
    specs: list[TensorSpec] = []
    for layer_idx in config.moe_layer_indices:
        layer = ExpertTensors(config, layer_idx, checkpoint)
        specs += [spec for expert_id in range(config.num_experts) for spec in layer.specs(expert_id)]
        if config.has_shared_expert:
            specs += shared_specs(config, layer_idx)
    return specs


def _left_out(name: str, config: ModelConfig) -> bool:
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    layer = _LAYER.match(name)
    first = config.num_hidden_layers
    return layer is not None and first <= int(layer[1]) < first + config.num_mtp_layers
