"""The example of services/README.md is a family that works."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import numpy as np
import pytest

from services.model import ReferenceModel, load_config
from services.model.attention_model import attention_specs
from services.model.checkpoint import Checkpoint
from services.model.families import FAMILIES
from services.model.inventory import expert_specs

README = Path(__file__).parents[4] / "services" / "README.md"
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


def example() -> types.ModuleType:
    """Return the module in the README."""
    section = README.read_text().split("## A new family")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    module = types.ModuleType("mixtral")
    exec(code[1], module.__dict__)
    return module


def write_random(folder: Path) -> None:
    """Write the tensors that the family needs, and no other."""
    config = load_config(folder)
    specs = [*attention_specs(config), *expert_specs(Checkpoint(folder, {}), config)]
    rng, header, data = np.random.default_rng(0), {}, b""
    for spec in specs:
        array = rng.standard_normal(spec.shape, dtype=np.float32)
        offsets = [len(data), len(data) + array.nbytes]
        header[spec.name] = {"dtype": "F32", "shape": spec.shape, "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_the_readmes_example_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "mixtral", example())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_random(tmp_path)
    model = ReferenceModel.load(tmp_path)
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in model.experts.weights.tensor_names
    logits = model.logits([1, 2, 3])
    assert logits.shape == (3, 64)
    assert np.isfinite(logits).all()
