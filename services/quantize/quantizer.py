"""From a checkpoint to the same one in INT8.

1. Windows of calibration text become one batch; its embeddings are the first layer's input.
2. Layer by layer: `LayerQuantizer` rounds, the writer takes the tensors, `hidden` moves on. One layer is in memory.
3. Everything else (embedding, head, norms, MTP layers) is copied as stored; config.json says what was rounded, in the
   compressed-tensors layout that other engines read too.

The result appears under its name only when it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.errors import ConfigError
from services.model import numerics
from services.model.attention_model import attention_specs
from services.model.batch import Batch
from services.model.checkpoint import E4M3, SCALE_SUFFIXES, Checkpoint, TensorSpec
from services.model.checkpoint_writer import CheckpointWriter
from services.model.config import load_config
from services.model.int8 import Int8Matrix
from services.model.inventory import check_inventory, expert_specs
from services.model.kv_cache import KvCache, KvSpec
from services.model.model_config import Int8Config, ModelConfig
from services.quantize.layer import LayerQuantizer, LayerReport, Recipe
from services.quantize.text import Ids

BLOCK_TOKENS = 16
E4M3_SUFFIX = SCALE_SUFFIXES[E4M3]
ROUNDING = {"num_bits": 8, "type": "int", "symmetric": True}
Progress = Callable[[int, int], None]  # (layers done, layers in total)


@dataclass(slots=True)
class QuantizeReport:
    """What was done, by layer."""

    layers: list[LayerReport]
    source_bytes: int
    target_bytes: int

    @property
    def worst(self) -> tuple[str, float]:
        """Return the projection with the largest relative output error, and the error."""
        errors = {name: error for layer in self.layers for name, error in layer.errors.items()}
        name = max(errors, key=lambda key: errors[key])
        return name, errors[name]

    @property
    def fewest_rows(self) -> tuple[int, int]:
        """Return (rows routed, rows shown) of the expert with the fewest routed; (0, 0) without experts."""
        return min((rows for layer in self.layers for rows in layer.expert_rows), default=(0, 0))


def quantize(
    source: Path, target: Path, token_ids: Ids, recipe: Recipe, progress: Progress
) -> QuantizeReport:
    """Write `source` in INT8 to `target`.

    Args:
        source: a checkpoint in float32, float16, bfloat16 or block-scaled e4m3.
        target: must not exist.
        token_ids: [n, length] calibration windows.

    Raises:
        ConfigError: the source, or `target` exists.
    """
    config = load_config(source)
    checkpoint = Checkpoint.open(source, config.quantization)
    check_inventory(checkpoint, config, attention_specs(config))
    if isinstance(config.quantization, Int8Config):
        raise ConfigError(f"{source}: is in INT8 already")
    if target.exists():
        raise ConfigError(f"--out {target}: exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        report = _write(source, scratch, config, checkpoint, token_ids, recipe, progress)
        scratch.chmod(0o755)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return report


def _write(
    source: Path,
    target: Path,
    config: ModelConfig,
    checkpoint: Checkpoint,
    token_ids: Ids,
    recipe: Recipe,
    progress: Progress,
) -> QuantizeReport:
    writer = CheckpointWriter(target)
    batch, kv = _calibration_batch(config, token_ids)
    embedding_spec = TensorSpec("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    embedding = checkpoint.load([embedding_spec]).array(embedding_spec.name)
    if int(token_ids.max()) >= config.vocab_size:
        raise ConfigError(
            f"{source}: tokenizer.json gives ids up to {token_ids.max()}, vocab_size is {config.vocab_size}"
        )
    hidden = numerics.widen(embedding[batch.token_ids])
    quantizer = LayerQuantizer(config, checkpoint, batch, kv, recipe)
    done: set[str] = set()
    reports = []
    for layer_idx in range(config.num_hidden_layers):
        hidden, tensors = quantizer.quantize(layer_idx, hidden)
        reports.append(quantizer.report)
        for name, tensor in sorted(tensors.items()):
            done |= _add(writer, checkpoint, name, tensor)
        progress(layer_idx + 1, config.num_hidden_layers)
    done |= _replaced_names(checkpoint, config)
    _copy_rest(writer, checkpoint, done)
    paths = writer.finish()
    _copy_files(source, target)
    _write_config(source, target, config)
    target_bytes = sum(path.stat().st_size for path in paths)
    source_bytes = sum(path.stat().st_size for path in {t.path for t in checkpoint.tensors.values()})
    return QuantizeReport(reports, source_bytes, target_bytes)


def _calibration_batch(config: ModelConfig, token_ids: Ids) -> tuple[Batch, KvCache]:
    count, length = token_ids.shape
    blocks = -(-length // BLOCK_TOKENS)
    # All layers write to the same rows, one after the other: a cache of one layer would do, but for its indices.
    kv = KvCache(KvSpec.of(config), count * blocks, BLOCK_TOKENS)
    batch = Batch(
        token_ids=np.ascontiguousarray(token_ids.reshape(-1)),
        positions=np.tile(np.arange(length, dtype=np.int32), count),
        seq_of_row=np.repeat(np.arange(count, dtype=np.int32), length),
        block_tables=np.arange(count * blocks, dtype=np.int32).reshape(count, blocks),
        block_tokens=BLOCK_TOKENS,
    )
    return batch, kv


def _add(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    name: str,
    tensor: npt.NDArray[np.float32] | Int8Matrix,
) -> set[str]:
    """Write a tensor; return the names that need no copying any more."""
    if isinstance(tensor, Int8Matrix):
        writer.add(name, tensor.q)
        writer.add(f"{name}_scale", tensor.scale[:, None])
        return {name, name + E4M3_SUFFIX}
    writer.add(name, _as_stored(tensor, checkpoint.tensors[name].dtype))
    return {name}


def _as_stored(tensor: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Return values that fit the stored type exactly in that type, else float32."""
    wide = np.ascontiguousarray(tensor, np.float32)
    narrow: npt.NDArray[Any]
    if dtype == "BF16":
        narrow = (wide.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    elif dtype == "F16":
        narrow = wide.astype(np.float16)
    else:
        return wide
    return narrow if np.array_equal(numerics.widen(narrow), wide) else wide


def _replaced_names(checkpoint: Checkpoint, config: ModelConfig) -> set[str]:
    """The experts' tensors as they were stored, stacked ones too."""
    return {name for spec in expert_specs(checkpoint, config) for name in checkpoint.check(spec)}


def _copy_rest(writer: CheckpointWriter, checkpoint: Checkpoint, done: set[str]) -> None:
    """Copy as stored; what is in e4m3 becomes float32, since config.json can name one way of storing 8 bits only."""
    scales = {name + E4M3_SUFFIX for name, stored in checkpoint.tensors.items() if stored.dtype == E4M3}
    for name, stored in sorted(checkpoint.tensors.items()):
        if name in done or name in scales:
            continue
        if stored.dtype == E4M3:
            spec = TensorSpec(name, stored.shape, quantisable=True)
            writer.add(name, numerics.dense(checkpoint.load([spec]).matrix(name)))
        else:
            raw = np.fromfile(stored.path, np.uint8, stored.end - stored.start, offset=stored.start)
            writer.add_raw(name, stored.dtype, stored.shape, raw)


def _copy_files(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        weights = path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
        if path.is_file() and not weights and path.name != "config.json" and path.suffix != ".py":
            shutil.copy(path, target / path.name)


def _write_config(source: Path, target: Path, config: ModelConfig) -> None:
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": ROUNDING | {"strategy": "channel", "dynamic": False},
                "input_activations": ROUNDING | {"strategy": "token", "dynamic": True},
            }
        },
        "ignore": _ignored(config),
    }
    with (target / "config.json").open("x", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _ignored(config: ModelConfig) -> list[str]:
    gate = config.names.gate.removesuffix(".weight")
    ignored = ["lm_head", rf"re:.*\.{re.escape(config.names.mlp)}\.{re.escape(gate)}$"]
    if config.mla is not None:
        ignored.append(r"re:.*\.self_attn\.kv_b_proj$")
    first = config.num_hidden_layers
    return ignored + [rf"re:model\.layers\.{first + i}\..*" for i in range(config.num_mtp_layers)]
