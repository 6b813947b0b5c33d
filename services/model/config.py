"""What a checkpoint's `config.json` says, checked once and frozen.

Spellings differ between releases of transformers (`num_experts` or `num_local_experts`, `rope_scaling` with
`rope_theta` or `rope_parameters`); all known ones are accepted. What would change results and is missing,
contradictory or not implemented is refused: a wrong guess would serve wrong tokens without a word. What a
family means by its fields stands in its file in `families`.
"""

from __future__ import annotations

from pathlib import Path

from bus.errors import ConfigError
from services.model.config_fields import Fields, read_json_object
from services.model.families import FAMILIES
from services.model.model_config import (
    Fp8Config,
    Int8Config,
    MlaConfig,
    ModelConfig,
    RopeConfig,
    TensorNames,
)

__all__ = [
    "Fp8Config",
    "Int8Config",
    "MlaConfig",
    "ModelConfig",
    "RopeConfig",
    "TensorNames",
    "load_config",
    "parse_config",
]


def load_config(folder: str | Path) -> ModelConfig:
    """Read and check `config.json` of a Hugging Face checkpoint folder.

    Raises:
        ConfigError: the folder is no checkpoint, or a field is missing, wrong or not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"model = {str(folder)!r}: must be a folder with config.json and *.safetensors")
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"model = {str(folder)!r}: has no config.json, so it is not a checkpoint folder")
    return parse_config(Fields(read_json_object(path), str(path)))


def parse_config(fields: Fields) -> ModelConfig:
    """Check the fields of one `config.json`. Raises ConfigError."""
    model_type = fields.raw("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        fields.fail("model_type", model_type, f"supported are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    names = fields.raw("architectures", default=None)
    if names is not None and (not isinstance(names, list) or family.ARCHITECTURE not in names):
        fields.fail("architectures", names, f"{model_type} is supported as {family.ARCHITECTURE} only")
    fields.only("hidden_act", "silu", rule="only silu is supported")
    config = family.parse(fields)
    if not config.moe_layer_indices:
        raise ConfigError(f"{fields.source}: no layer has experts; use the dense family's model_type")
    if config.top_k > config.num_experts:
        fields.fail("num_experts_per_tok", config.top_k, f"must be at most {config.num_experts} experts")
    return config
