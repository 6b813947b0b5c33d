"""kimi_k2 (Kimi K2): deepseek_v3 under another name, with more experts and fewer heads. Its tokenizer is tiktoken's."""

from __future__ import annotations

from dataclasses import replace

from services.model.config_fields import Fields
from services.model.families import deepseek_v3
from services.model.model_config import ModelConfig

ARCHITECTURE = deepseek_v3.ARCHITECTURE


def parse(fields: Fields) -> ModelConfig:
    """Check one `config.json`. Raises ConfigError."""
    return replace(deepseek_v3.parse(fields), model_type="kimi_k2")
