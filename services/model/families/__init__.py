"""The model families, one small file each: how it reads `config.json`, and where that differs from the others.

A family is a module with

    ARCHITECTURE                    the class that `architectures` of its checkpoints names
    parse(fields) -> ModelConfig    checks the fields and says what they mean

and an entry here. What it is made of (attention, gates, rotary positions, names of tensors) are values of
`ModelConfig`; only a family that computes something new needs code elsewhere. See "A new family" in
`services/README.md`.
"""

from __future__ import annotations

from typing import Protocol

from services.model.config_fields import Fields
from services.model.families import (
    deepseek_v3,
    glm4_moe,
    kimi_k2,
    llama,
    minimax_m2,
    qwen3,
    qwen3_moe,
)
from services.model.model_config import ModelConfig


class Family(Protocol):
    """A module of this package."""

    @property
    def ARCHITECTURE(self) -> str:
        """Return the class name that `architectures` must hold, if the field is there."""

    def parse(self, fields: Fields) -> ModelConfig:
        """Check one `config.json`. Raises ConfigError."""


FAMILIES: dict[str, Family] = {
    "deepseek_v3": deepseek_v3,
    "glm4_moe": glm4_moe,
    "kimi_k2": kimi_k2,
    "llama": llama,
    "minimax_m2": minimax_m2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}
