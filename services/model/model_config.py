"""What a model is, checked and frozen: the values that the arithmetic needs, in one spelling for all families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QkNorm = Literal["none", "per_head", "all_heads"]
Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary positions of the first `dim` columns of a head. `factor` and below belong to the scaled kinds."""

    dim: int
    theta: float
    kind: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention. `q_lora_rank` None = queries are projected directly."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Config:
    """Weights stored as e4m3 with one factor per block of `block_rows` x `block_columns` elements."""

    block_rows: int
    block_columns: int


@dataclass(frozen=True, slots=True)
class Int8Config:
    """Weights stored as whole numbers with one factor per row; activations are rounded row by row as they come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Where a checkpoint keeps the parts of `model.layers.N`; all but `mlp` are below `mlp`.

    `projections` are a routed expert's gate, up and down. `shared_expert` "" = the MLP itself (dense models).
    """

    mlp: str = "mlp"
    gate: str = "gate.weight"
    correction_bias: str = "gate.e_score_correction_bias"
    experts: str = "experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: str = "shared_experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder. Names are Hugging Face's; `mla` None = grouped-query attention.

    A dense model is one whose layers all have a shared expert and no routed ones: its MLPs are computed where
    experts are, and `num_experts` and `top_k` are 0.
    """

    model_type: str
    names: TensorNames
    quantization: Fp8Config | Int8Config | None
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_mtp_layers: int  # stored after the others; not served
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool  # of q, k and v, or of the latent projections
    attention_output_bias: bool
    qk_norm: QkNorm
    rope: RopeConfig
    mla: MlaConfig | None = None
    intermediate_size: int  # of the layers that `moe_layer_indices` leaves out; 0 when there is none
    moe_intermediate_size: int
    moe_layer_indices: tuple[int, ...]
    num_experts: int
    num_shared_experts: int
    top_k: int
    scoring: Scoring
    gate_correction_bias: bool
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int

    @property
    def num_moe_layers(self) -> int:
        """Return how many layers have experts."""
        return len(self.moe_layer_indices)

    @property
    def has_shared_expert(self) -> bool:
        """Tell whether every token also visits a shared expert (its id is `num_experts`)."""
        return self.num_shared_experts > 0

    @property
    def num_slots(self) -> int:
        """Return the expert outputs per token: the routed ones in top-k order, then the shared one."""
        return self.top_k + int(self.has_shared_expert)
