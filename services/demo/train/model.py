"""The demo model in torch, for training: DeepSeek-V3 at 1/100,000 of its size.

Its parts are those of the real one: multi-head latent attention (low-rank queries and keys/values, one
rotary key shared by the heads, interleaved RoPE), a leading dense layer, then mixture-of-experts layers
with a sigmoid router whose correction bias only chooses experts (never weighs them), one shared expert, and
one multi-token-prediction (MTP) layer that reads the hidden state of position i and the embedding of token
i+1 to predict token i+2. Embedding, output head and the MTP head are one matrix.

Module names follow the Hugging Face layout, except that a layer's experts are stacked in two tensors, so
that `export` has only those to take apart. The forward pass has no cache and no padding: training needs
neither.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes, by their Hugging Face names."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 5
    num_nextn_predict_layers: int = 1
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    routed_scaling_factor: float = 2.0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048

    def to_hf(self, separator_id: int) -> dict[str, object]:
        """Return the content of `config.json`, with every field a reader might otherwise guess."""
        fixed: dict[str, object] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": self.num_attention_heads,
            "moe_layer_freq": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_interleave": True,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": separator_id,
            "eos_token_id": separator_id,
            "pad_token_id": None,
            "torch_dtype": "bfloat16",
        }
        return fixed | asdict(self)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rotary_tables(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each `(length, qk_rope_head_dim / 2)`."""
    exponents = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float) / config.qk_rope_head_dim
    angles = torch.arange(length)[:, None] * (1.0 / config.rope_theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of `(..., length, rope)`; the halves come out concatenated."""
    cos, sin = tables
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        heads = c.num_attention_heads
        self.q_a_proj = linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = Norm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = linear(c.q_lora_rank, heads * (c.qk_nope_head_dim + c.qk_rope_head_dim))
        self.kv_a_proj_with_mqa = linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = Norm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = linear(heads * c.v_head_dim, c.hidden_size)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        c = self.config
        batch, length, _ = x.shape
        heads = (batch, length, c.num_attention_heads, -1)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(heads).transpose(1, 2)
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(heads).transpose(1, 2)
        k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), -1)
        k_rope = rotate(k_rope[:, None], tables).expand(-1, c.num_attention_heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_rope, tables)), -1)
        k = torch.cat((k_nope, k_rope), -1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, inner), linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The router: top-k by score plus bias, weights from the scores alone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.load = torch.zeros(config.n_routed_experts)  # tokens per expert since the last `balance`

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.weight).sigmoid()
        chosen = (
            (scores.detach() + self.e_score_correction_bias).topk(self.config.num_experts_per_tok, -1).indices
        )
        weights = scores.gather(-1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config.routed_scaling_factor
        if self.training:
            self.load += chosen.flatten().bincount(minlength=self.config.n_routed_experts)
        return weights, chosen

    def balance(self, rate: float) -> float:
        """Raise the bias of experts with too little load, lower the others'; return busiest over average."""
        mean = self.load.mean()
        self.e_score_correction_bias += rate * ((mean - self.load) / mean).clamp(-1, 1)
        imbalance = float(self.load.max() / mean)
        self.load.zero_()
        return imbalance


class Moe(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        self.gate = Gate(config)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner))
        self.shared_experts = Mlp(hidden, inner * config.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Group the (token, expert) pairs by expert, so that each expert is one product per matrix."""
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat)
        order = chosen.flatten().argsort(stable=True)
        token = order // chosen.shape[1]
        counts = chosen.flatten().bincount(minlength=len(self.down)).tolist()
        outputs = []
        for rows, gate_up, down in zip(
            flat[token].split(counts), self.gate_up.unbind(), self.down.unbind(), strict=True
        ):
            gate, up = F.linear(rows, gate_up).chunk(2, -1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        routed = torch.cat(outputs) * weights.flatten()[order, None]
        return self.shared_experts(flat).index_add(0, token, routed).view_as(x)


class Layer(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        dense = index < config.first_k_dense_replace
        self.mlp = Mlp(config.hidden_size, config.intermediate_size) if dense else Moe(config)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables)
        return x + self.mlp(self.post_attention_layernorm(x))


class MtpLayer(Layer):
    """A decoder layer over (embedding of token i+1, hidden state of position i)."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__(config, index)
        self.enorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": Norm(config.hidden_size, config.rms_norm_eps)})

    def draft(self, embedded: Tensor, hidden: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))
        return self.shared_head["norm"](self(x, tables))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers: list[Layer] = [Layer(config, index) for index in range(config.num_hidden_layers)]
        layers.append(MtpLayer(config, config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.initialise()

    def initialise(self) -> None:
        """Normal weights; those that write to the residual stream start smaller, the deeper the model."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                writes = name.endswith(("o_proj.weight", "down_proj.weight", "mlp.down"))
                scale = (2 * self.config.num_hidden_layers) ** -0.5 if writes else 1.0
                nn.init.normal_(
                    parameter, std=scale * (0.02 if "embed" in name else parameter.shape[-1] ** -0.5 / 2)
                )

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the normed hidden states `(batch, length, hidden)` of `(batch, length)` token ids."""
        tables = rotary_tables(self.config, ids.shape[1])
        x = self.embed_tokens(ids)
        for layer in self.layers[:-1]:
            x = layer(x, tables)
        return self.norm(x)

    def draft(self, next_ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the MTP layer's hidden states, from hidden states and the ids one to the right of them."""
        tables = rotary_tables(self.config, next_ids.shape[1])
        return self.layers[-1].draft(self.embed_tokens(next_ids), hidden, tables)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)

    def gates(self) -> list[Gate]:
        return [module for module in self.modules() if isinstance(module, Gate)]


def to_hf_tensors(model: Model) -> dict[str, Tensor]:
    """Return the weights by their Hugging Face names: bfloat16, the router's bias float32."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up":
            for index, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                tensors[f"{stem}.experts.{index}.gate_proj.weight"] = gate
                tensors[f"{stem}.experts.{index}.up_proj.weight"] = up
        elif last == "down":
            for index, matrix in enumerate(tensor):
                tensors[f"{stem}.experts.{index}.down_proj.weight"] = matrix
        else:
            tensors[name] = tensor
    keep = "e_score_correction_bias"
    return {
        f"model.{name}": tensor.contiguous().clone()
        if name.endswith(keep)
        else tensor.bfloat16().contiguous()
        for name, tensor in tensors.items()
    }


def export(model: Model, folder: Path, separator_id: int) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors`, the last one atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = {"bos_token_id": separator_id, "eos_token_id": separator_id, "do_sample": False}
    config = model.config.to_hf(separator_id)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    partial = folder / ".model.safetensors.partial"
    save_file(to_hf_tensors(model), partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.rename(folder / "model.safetensors")


def load(folder: Path) -> Model:
    """Read an exported folder back, as float32."""
    fields = json.loads((folder / "config.json").read_text())
    model = Model(Config(**{name: fields[name] for name in Config.__dataclass_fields__}))
    tensors = load_file(folder / "model.safetensors")
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        stem, _, last = name.rpartition(".")
        experts = [f"model.{stem}.experts.{index}." for index in range(model.config.n_routed_experts)]
        if last == "gate_up":
            parts = [torch.cat([tensors[f"{e}{p}_proj.weight"] for p in ("gate", "up")]) for e in experts]
            state[name] = torch.stack(parts)
        elif last == "down":
            state[name] = torch.stack([tensors[f"{e}down_proj.weight"] for e in experts])
        else:
            state[name] = tensors[f"model.{name}"]
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval()
