"""What a checkpoint's `config.json` says, checked once and frozen.

Spellings differ between releases of transformers (`num_experts` or `num_local_experts`, `rope_scaling` with
`rope_theta` or `rope_parameters`); all known ones are accepted. What would change results and is missing,
contradictory or not implemented is refused: a wrong guess would serve wrong tokens without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bus.errors import ConfigError
from services.model.config_fields import Fields, read_json_object

ROPE_FIELDS = {
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary positions. `factor` and below belong to `kind` "linear" and "yarn"."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


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
class ModelConfig:
    """A Mixture-of-Experts decoder. Names are Hugging Face's; `mla` None = grouped-query attention."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    intermediate_size: int  # of dense layers; 0 when there is none
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    num_shared_experts: int
    moe_layer_indices: tuple[int, ...]
    rope: RopeConfig
    mla: MlaConfig | None = None

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
    """Check the fields of one `config.json`."""
    model_type = fields.raw("model_type")
    if not isinstance(model_type, str) or model_type not in PARSERS:
        fields.fail("model_type", model_type, f"supported are {', '.join(sorted(PARSERS))}")
    fields.only("hidden_act", "silu", rule="only silu is supported")
    fields.only("quantization_config", rule="quantised checkpoints are not supported")
    config = PARSERS[model_type](fields)
    if not config.moe_layer_indices:
        raise ConfigError(f"{fields.source}: no layer has experts; a dense model is not supported")
    if config.top_k > config.num_experts:
        fields.fail("num_experts_per_tok", config.top_k, f"must be at most {config.num_experts} experts")
    return config


def _parse_qwen3_moe(fields: Fields) -> ModelConfig:
    fields.only("use_sliding_window", False, rule="sliding windows are not supported")
    num_layers = fields.integer("num_hidden_layers")
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads")
    if heads % kv_heads:
        fields.fail("num_key_value_heads", kv_heads, f"must divide num_attention_heads = {heads}")
    head_dim = fields.integer("head_dim", minimum=2, default=hidden_size // heads)
    if head_dim % 2:
        fields.fail("head_dim", head_dim, "must be even")
    moe_layers = _sparse_layers(fields, num_layers)
    return ModelConfig(
        model_type="qwen3_moe",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=fields.flag("attention_bias", default=False),
        intermediate_size=fields.integer("intermediate_size") if len(moe_layers) < num_layers else 0,
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        num_experts=fields.integer("num_experts", "num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
        num_shared_experts=0,
        moe_layer_indices=moe_layers,
        rope=_parse_rope(fields),
    )


def _sparse_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.raw("mlp_only_layers", default=None) or []
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < num_layers for i in dense):
        fields.fail("mlp_only_layers", dense, f"must be a list of layer indices below {num_layers}")
    return tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)


def _parse_deepseek_v3(fields: Fields) -> ModelConfig:
    fields.only("scoring_func", "sigmoid", rule="deepseek_v3 is supported with sigmoid only")
    fields.only("topk_method", "noaux_tc", rule="deepseek_v3 is supported with noaux_tc only")
    fields.only("moe_layer_freq", 1, rule="only 1 is supported")
    num_layers, heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    fields.only("num_key_value_heads", heads, rule=f"must equal num_attention_heads = {heads}")
    first_dense = fields.integer("first_k_dense_replace", minimum=0)
    num_experts = fields.integer("n_routed_experts", "num_local_experts")
    n_group, topk_group = _expert_groups(fields, num_experts)
    mla = _parse_mla(fields)
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=mla.kv_lora_rank + mla.qk_rope_head_dim,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=fields.flag("attention_bias", default=False),
        intermediate_size=fields.integer("intermediate_size") if first_dense else 0,
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        num_experts=num_experts,
        top_k=fields.integer("num_experts_per_tok"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
        n_group=n_group,
        topk_group=topk_group,
        num_shared_experts=fields.optional_integer("n_shared_experts", minimum=0) or 0,
        moe_layer_indices=tuple(range(first_dense, num_layers)),
        rope=_parse_rope(fields),
        mla=mla,
    )


def _parse_mla(fields: Fields) -> MlaConfig:
    rope_dim = fields.integer("qk_rope_head_dim", minimum=2)
    if rope_dim % 2:
        fields.fail("qk_rope_head_dim", rope_dim, "must be even")
    return MlaConfig(
        q_lora_rank=fields.optional_integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=rope_dim,
        v_head_dim=fields.integer("v_head_dim"),
        rope_interleave=fields.flag("rope_interleave", default=True),
    )


def _expert_groups(fields: Fields, num_experts: int) -> tuple[int, int]:
    n_group = fields.optional_integer("n_group") or 1
    topk_group = fields.optional_integer("topk_group") or n_group
    if num_experts % n_group or (n_group > 1 and num_experts // n_group < 2):
        fields.fail("n_group", n_group, f"must divide {num_experts} experts into groups of two or more")
    if topk_group > n_group:
        fields.fail("topk_group", topk_group, f"must be at most n_group = {n_group}")
    reachable = topk_group * (num_experts // n_group)
    top_k = fields.integer("num_experts_per_tok")
    if top_k > reachable:
        fields.fail(
            "num_experts_per_tok", top_k, f"must be at most the {reachable} experts of topk_group groups"
        )
    return n_group, topk_group


def _parse_rope(fields: Fields) -> RopeConfig:
    fields.only("partial_rotary_factor", 1, 1.0, rule="only 1 is supported")
    rope = fields.section("rope_parameters", "rope_scaling") or Fields({}, fields.source)
    for name in rope.values:
        if name not in ROPE_FIELDS:
            rope.fail(name, rope.values[name], "unknown field; it might change results")
    rope.only("partial_rotary_factor", 1, 1.0, rule="only 1 is supported")
    theta = _agreed_number(fields, rope, "rope_theta", 10000.0)
    kind = rope.raw("rope_type", "type", default="default")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        rope.only("mscale_all_dim", rule="belongs to yarn")
        return RopeConfig(theta=theta, kind="linear", factor=rope.number("factor", minimum=1.0))
    if kind != "yarn":
        rope.fail("rope_type", kind, "supported are default, linear, yarn")
    window = fields.integer("max_position_embeddings")
    original = _agreed_number(fields, rope, "original_max_position_embeddings", window)
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=rope.number("factor", minimum=1.0),
        original_max_position_embeddings=int(original),
        attention_factor=rope.optional_number("attention_factor"),
        beta_fast=rope.optional_number("beta_fast") or 32.0,
        beta_slow=rope.optional_number("beta_slow") or 1.0,
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", default=True),
    )


def _agreed_number(outer: Fields, inner: Fields, name: str, default: float) -> float:
    """A number that may stand at the top, in the rope section, or in both if they agree."""
    values = {
        section: section.values[name] for section in (inner, outer) if section.values.get(name) is not None
    }
    for section in values:
        value = section.number(name, minimum=2.0)
        if value != next(iter(values.values())):
            section.fail(
                name, value, f"contradicts {name} = {next(iter(values.values()))} of the rope section"
            )
    return float(next(iter(values.values()), default))


PARSERS: dict[str, Callable[[Fields], ModelConfig]] = {
    "qwen3_moe": _parse_qwen3_moe,
    "deepseek_v3": _parse_deepseek_v3,
}
