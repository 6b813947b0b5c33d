"""A checkpoint holds what its config says, all of it and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bus.errors import ConfigError
from services.model import AttentionModel, ReferenceModel, load_config
from services.model import numerics_reference as twin
from services.model.block_scaled import BlockScaled
from services.model.config_fields import read_json_object
from services.model.safetensors_header import read_header

GOLDENS = Path(__file__).parents[3] / "parity" / "goldens"
NUMPY = {"F32": np.float32, "BF16": np.uint16, "F8_E4M3": np.uint8}
NAMES = {"float32": "F32", "uint16": "BF16", "uint8": "F8_E4M3", "int64": "I64"}

Tensors = dict[str, npt.NDArray[Any]]


def read(folder: Path) -> Tensors:
    """Return all tensors of a checkpoint of one file, as stored."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    return {
        name: np.frombuffer(data[t.start : t.end], dtype=NUMPY[t.dtype]).reshape(t.shape)
        for name, t in read_header(path).items()
    }


def write(folder: Path, tensors: Tensors) -> None:
    header, data = {}, b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def changed(tmp_path: Path, golden: str, change: Callable[[Tensors], object], **config: Any) -> Path:
    """Copy a golden with its tensors changed in place and fields of config.json replaced."""
    tensors = read(GOLDENS / golden)
    change(tensors)
    write(tmp_path, tensors)
    values = read_json_object(GOLDENS / golden / "config.json") | config
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def load(folder: Path) -> AttentionModel:
    return AttentionModel.load(folder, load_config(folder))


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("golden", "change", "config", "text"),
    [
        ("qwen3_moe", lambda t: t.pop(EXPERT.replace("1.mlp", "2.mlp")), {}, "up_proj.weight is missing"),
        ("qwen3_moe", lambda t: t.pop("model.norm.weight"), {}, "tensor model.norm.weight is missing"),
        (
            "qwen3_moe",
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(72, dtype=np.float32)}),
            {},
            "tensor model.layers.0.self_attn.q_proj.bias: not part of qwen3_moe",
        ),
        ("qwen3_moe", lambda t: None, {"num_hidden_layers": 2}, "and 32 more: not part of qwen3_moe"),
        (
            "qwen3_moe",
            lambda t: None,
            {"num_local_experts": 7},
            "has shape [8, 36], config.json says [7, 36]",
        ),
        (
            "qwen3_moe",
            lambda t: None,
            {"head_dim": 14},
            "q_proj.weight has shape [72, 36], config.json says [84,",
        ),
        ("qwen3_moe", lambda t: t.update(x=np.zeros(1, dtype=np.int64)), {}, "tensor x: not part of"),
        (
            "qwen3_moe",
            lambda t: t.update({"model.norm.weight": np.zeros(36, dtype=np.int64)}),
            {},
            "tensor model.norm.weight is I64; supported are F32, F16, BF16",
        ),
        (
            "glm4_moe",
            lambda t: None,
            {"num_nextn_predict_layers": 0},
            "and 3 more: not part of glm4_moe with num_hidden_layers = 3 and num_nextn_predict_layers = 0",
        ),
        ("glm4_moe", lambda t: None, {"use_qk_norm": False}, "self_attn.k_norm.weight"),
        ("glm4_moe", lambda t: None, {"attention_bias": False}, "self_attn.k_proj.bias"),
        (
            "kimi_k2",
            lambda t: None,
            {"quantization_config": None},
            "is F8_E4M3: config.json has no quantization",
        ),
        ("kimi_k2", lambda t: t.pop(f"{EXPERT}_scale_inv"), {}, "up_proj.weight_scale_inv is missing"),
        (
            "kimi_k2",
            lambda t: t.update({EXPERT: np.zeros((20, 28), dtype=np.float32)}),
            {},
            "up_proj.weight_scale_inv: not part of kimi_k2",
        ),
        ("qwen3", lambda t: None, {"tie_word_embeddings": False}, "tensor lm_head.weight is missing"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, golden: str, change: Callable[[Tensors], object], config: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(changed(tmp_path, golden, change, **config))
    assert text in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_left_out_by_name(tmp_path: Path) -> None:
    """The golden holds a multi-token prediction layer; derived angles and a tied head may be stored too."""
    assert any(name.startswith("model.layers.3.") for name in read(GOLDENS / "glm4_moe"))
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, dtype=np.float32)}
    assert "lm_head.weight" in read(GOLDENS / "glm4_moe")
    model = load(changed(tmp_path, "glm4_moe", lambda t: t.update(angles)))
    assert not any(name.startswith("model.layers.3.") for name in model.weights.tensor_names)
    head = {"lm_head.weight": read(GOLDENS / "qwen3")["model.embed_tokens.weight"]}
    assert load(changed(tmp_path, "qwen3", lambda t: t.update(head)))


def test_a_weight_that_is_not_finite_stops_the_start(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        for name in ("model.layers.1.mlp.gate.weight", EXPERT):
            tensors[name] = tensors[name].copy()
            tensors[name][0, 0] = 0x7FC0

    folder = changed(tmp_path, "glm4_moe", spoil)
    with pytest.raises(ConfigError, match=r"mlp\.gate\.weight holds NaN"):
        load(folder)
    with pytest.raises(ConfigError, match=r"experts\.3\.up_proj\.weight holds NaN"):
        spoil_experts_only = read(folder)
        spoil_experts_only["model.layers.1.mlp.gate.weight"] = read(GOLDENS / "glm4_moe")[
            "model.layers.1.mlp.gate.weight"
        ]
        write(folder, spoil_experts_only)
        ReferenceModel.load(folder)


@pytest.mark.parametrize("golden", ["kimi_k2", "minimax_m2_fp8"])
def test_eight_bit_weights_give_the_bits_of_the_weights_written_out(tmp_path: Path, golden: str) -> None:
    folder = GOLDENS / golden
    stored, config = read(folder), read_json_object(folder / "config.json")
    block = config.pop("quantization_config")["weight_block_size"]
    plain: Tensors = {}
    for name, array in stored.items():
        if array.dtype == np.uint8:
            scaled = BlockScaled(array, stored[f"{name}_scale_inv"], *block)
            plain[name] = twin.dequantise(scaled).astype(np.float32)
        elif not name.endswith("_scale_inv"):
            plain[name] = array
    assert len(plain) < len(stored)
    write(tmp_path, plain)
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = list(range(5, 45))
    eight_bit, written_out = ReferenceModel.load(folder), ReferenceModel.load(tmp_path)
    assert eight_bit.logits(prompt).tobytes() == written_out.logits(prompt).tobytes()
    assert eight_bit.experts.weights.held_bytes < written_out.experts.weights.held_bytes / 2


def test_a_sharded_checkpoint_is_checked_as_a_whole(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "minimax_m2", tmp_path, dirs_exist_ok=True)
    index_path = tmp_path / "model.safetensors.index.json"
    index = read_json_object(index_path)
    left = index["weight_map"].pop("model.layers.1.block_sparse_moe.experts.7.w2.weight")
    assert left.endswith(".safetensors")
    index_path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"experts\.7\.w2\.weight is missing"):
        load(tmp_path)
