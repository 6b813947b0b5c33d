"""The reference transformer: a Hugging Face folder in, float32 logits out, split the way the pod is split.

`AttentionModel` is what an attention worker holds, `ExpertModel` what an expert worker holds,
`ReferenceModel` both. `numerics` is the only module that multiplies or reduces.
"""

from services.model.attention_model import AttentionModel, MoeInput
from services.model.batch import Batch
from services.model.config import ModelConfig, load_config
from services.model.expert_model import ExpertModel
from services.model.kv_cache import KvCache, KvSpec
from services.model.reference import ReferenceModel

__all__ = [
    "AttentionModel",
    "Batch",
    "ExpertModel",
    "KvCache",
    "KvSpec",
    "ModelConfig",
    "MoeInput",
    "ReferenceModel",
    "load_config",
]
