"""Expert weights in both checkpoint layouts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from bus.errors import ConfigError
from services.model import ExpertModel, load_config
from services.model.checkpoint import Checkpoint
from services.model.config import ModelConfig

GOLDENS = Path(__file__).parents[3] / "parity" / "goldens"


def load(name: str) -> tuple[Path, ModelConfig]:
    return GOLDENS / name, load_config(GOLDENS / name)


def stack_experts(folder: Path, config: ModelConfig, target: Path) -> None:
    """Write the routed experts of a checkpoint in the stacked layout."""
    whole = ExpertModel.load(folder, config, range(config.num_experts), shared=False)
    header, data = {}, b""
    for layer in config.moe_layer_indices:
        experts = [whole._experts[layer, e] for e in range(config.num_experts)]
        stacked = {
            "gate_up_proj": np.stack([np.concatenate([e.gate, e.up]) for e in experts]),
            "down_proj": np.stack([e.down for e in experts]),
        }
        for name, array in stacked.items():
            offsets = [len(data), len(data) + array.nbytes]
            entry = {"dtype": "F32", "shape": array.shape, "data_offsets": offsets}
            header[f"model.layers.{layer}.mlp.experts.{name}"] = entry
            data += array.tobytes()
    text = json.dumps(header).encode()
    (target / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_the_stacked_layout_gives_the_same_bits(tmp_path: Path) -> None:
    folder, config = load("qwen3_moe")
    stack_experts(folder, config, tmp_path)
    apart = ExpertModel.load(folder, config, [2, 5], shared=False)
    stacked = ExpertModel.load(tmp_path, config, [2, 5], shared=False)
    x = np.random.default_rng(0).standard_normal((3, config.hidden_size), dtype=np.float32)
    for layer in config.moe_layer_indices:
        for expert_id in (2, 5):
            out = np.empty((3, config.hidden_size), dtype=np.float32)
            assert stacked.forward(layer, expert_id, x, out) is out
            assert out.tobytes() == apart.forward(layer, expert_id, x).tobytes()
    assert stacked.weights.held_bytes == apart.weights.held_bytes


def test_impossible_experts_are_refused() -> None:
    folder, config = load("qwen3_moe")
    with pytest.raises(ConfigError, match=r"expert id 8: must be in 0 \.\. 7"):
        ExpertModel.load(folder, config, [8], shared=False)
    with pytest.raises(ConfigError, match="has no shared expert"):
        ExpertModel.load(folder, config, [0], shared=True)


def test_a_checkpoint_of_other_sizes_is_refused() -> None:
    folder, config = load("qwen3_moe")
    wrong = dataclasses.replace(config, moe_intermediate_size=24)
    with pytest.raises(
        ConfigError, match=r"experts\.0\.gate_proj\.weight has shape \[20, 36\], config\.json says"
    ):
        ExpertModel.load(folder, wrong, [0], shared=False)
    more = dataclasses.replace(config, num_experts=9)
    with pytest.raises(ConfigError, match=r"experts\.8\.gate_proj\.weight is missing"):
        ExpertModel.load(folder, more, [8], shared=False)


def test_the_shared_expert_has_the_id_after_the_last(tmp_path: Path) -> None:
    folder, config = load("deepseek_v3")
    shared = ExpertModel.load(folder, config, [], shared=True)
    assert all(".shared_experts." in name for name in shared.weights.tensor_names)
    x = np.ones((2, config.hidden_size), dtype=np.float32)
    assert shared.forward(1, config.num_experts, x).shape == x.shape
    with pytest.raises(KeyError):
        shared.forward(1, 0, x)
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in Checkpoint.open(folder)
