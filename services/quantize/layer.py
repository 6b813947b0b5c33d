"""One decoder layer in INT8.

1. Attention runs as it is on the calibration rows, which leaves each projection's input statistics.
2. The scales of the input norm (and of MLA's query norm) are chosen, the projections rounded, and attention runs again,
   rounded: later parts are calibrated on what they will really get.
3. The same for the dense MLP or the experts, one at a time. An expert that the router gives fewer than `min_rows` rows
   is also shown the rows that came closest to choosing it, so that no expert is rounded blindly.

Scales are powers of two, so norms and the gate's matrix stay exact in the type they are stored in. `kv_b_proj` of MLA,
gates and biases are not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from services.model import numerics
from services.model.attention_model import DecoderLayer, layer_specs
from services.model.batch import Batch
from services.model.checkpoint import Checkpoint, Weights
from services.model.int8 import Int8Matrix
from services.model.kv_cache import KvCache
from services.model.mlp import ExpertTensors, Mlp, shared_prefix, shared_specs
from services.model.model_config import ModelConfig
from services.model.rope import RopeTable
from services.quantize.gptq import gptq, output_error, round_to_nearest
from services.quantize.smooth import channel_maxima, smoothing
from services.quantize.statistics import InputStatistics

Float = npt.NDArray[np.float32]
AFTER_INPUT_NORM = ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa")
Tensors = dict[str, npt.NDArray[np.float32] | Int8Matrix]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to round. strength: of smoothing. compensate: GPTQ instead of rounding each entry by itself."""

    strength: float = 0.5
    damping: float = 0.01
    compensate: bool = True
    min_rows: int = 128


@dataclass(slots=True)
class LayerReport:
    """errors: relative squared output error by projection. expert_rows: (routed, shown) of each expert."""

    errors: dict[str, float] = field(default_factory=dict)
    expert_rows: list[tuple[int, int]] = field(default_factory=list)


class LayerQuantizer:
    """Rounds one layer after the other; `hidden` [T, hidden] moves on with each.

    Args:
        batch: the calibration windows, each one a sequence. kv: a cache for them.
    """

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, batch: Batch, kv: KvCache, recipe: Recipe
    ) -> None:
        self._config, self._checkpoint, self._recipe = config, checkpoint, recipe
        self._batch, self._kv = batch, kv
        self._angles = RopeTable(config.rope).rows(batch.positions)
        self.report = LayerReport()

    def quantize(self, layer_idx: int, hidden: Float) -> tuple[Float, Tensors]:
        """Return (hidden after the rounded layer, the layer's tensors that are not as they were)."""
        self.report = LayerReport()
        prefix = f"model.layers.{layer_idx}"
        weights = self._checkpoint.load(layer_specs(self._config, layer_idx))
        changed = self._attention(layer_idx, hidden, weights)
        layer = DecoderLayer(self._config, layer_idx, weights.replaced(changed))
        x = numerics.rms_norm(hidden, layer.input_norm, self._config.rms_norm_eps)
        hidden = hidden + layer.attention.forward(x, self._angles, self._batch, self._kv)
        x = numerics.rms_norm(hidden, layer.post_norm, self._config.rms_norm_eps)
        norm = f"{prefix}.post_attention_layernorm.weight"
        if layer.dense is not None:
            mlp, scales, tensors = self._mlps(x, {f"{prefix}.{self._config.names.mlp}": (layer.dense, None)})
            hidden = hidden + next(iter(mlp.values())).forward(x / scales)
        else:
            hidden, scales, tensors = self._experts(layer_idx, layer, hidden, x)
        changed |= tensors
        changed[norm] = (weights.vector(norm) / scales).astype(np.float32)
        return hidden, changed

    # ------------------------------------------------------------------ attention

    def _attention(self, layer_idx: int, hidden: Float, weights: Weights) -> Tensors:
        prefix = f"model.layers.{layer_idx}"
        layer = DecoderLayer(self._config, layer_idx, weights)
        seen: dict[str, InputStatistics] = {}
        for linear in layer.attention.linears:
            linear.watch = lambda name, rows: seen.setdefault(name, InputStatistics.empty(rows.shape[1])).add(
                rows
            )
        x = numerics.rms_norm(hidden, layer.input_norm, self._config.rms_norm_eps)
        layer.attention.forward(x, self._angles, self._batch, self._kv)
        changed: Tensors = {}
        after_norm: dict[str, tuple[str, ...]] = {
            f"{prefix}.input_layernorm.weight": AFTER_INPUT_NORM,
            f"{prefix}.self_attn.q_a_layernorm.weight": ("q_b_proj",),
        }
        left = set(seen)
        for norm, readers in after_norm.items():
            names = [name for name in seen if name.rsplit(".", 1)[1] in readers]
            if names:
                matrices = {name: numerics.dense(weights.matrix(f"{name}.weight")) for name in names}
                wide = {name: numerics.widen(matrix) for name, matrix in matrices.items()}
                scales = self._smooth(seen[names[0]].maxima, list(wide.values()))
                changed[norm] = weights.vector(norm) / scales
                for name, matrix in wide.items():
                    self._round(f"{name}.weight", matrix * scales, seen[name].divided(scales), changed)
                left -= set(names)
        for name in sorted(left):
            matrix = numerics.widen(numerics.dense(weights.matrix(f"{name}.weight")))
            self._round(f"{name}.weight", matrix, seen[name].hessian, changed)
        return changed

    # ------------------------------------------------------------------ MLPs

    def _experts(
        self, layer_idx: int, layer: DecoderLayer, hidden: Float, x: Float
    ) -> tuple[Float, Float, Tensors]:
        config, checkpoint = self._config, self._checkpoint
        tensors = ExpertTensors(config, layer_idx, checkpoint)
        base = f"model.layers.{layer_idx}.{config.names.mlp}"
        experts: dict[str, tuple[Mlp, npt.NDArray[np.intp] | None]] = {}
        topk_idx, topk_weights = np.empty((len(x), 0), np.int32), np.empty((len(x), 0), np.float32)
        gate = f"{base}.{config.names.gate}"
        if layer.router is not None:
            topk_idx, topk_weights = layer.router.route(x)
            scores = layer.router.logits(x)
            for expert in range(config.num_experts):
                loaded = tensors.take(checkpoint.load(tensors.specs(expert)), expert)
                rows = self._rows_of(expert, topk_idx, scores)
                experts[f"{base}.{config.names.experts}.{expert}"] = (loaded, rows)
        shared = shared_prefix(config, layer_idx)
        if config.has_shared_expert:
            loaded = Mlp.from_weights(checkpoint.load(shared_specs(config, layer_idx)), shared)
            experts[shared] = (loaded, None)
        rounded, scales, changed = self._mlps(x, experts)
        if layer.router is not None:
            changed[gate] = numerics.widen(layer.router.weight) * scales
        out = np.empty((len(x), config.num_slots, config.hidden_size), np.float32)
        for expert in range(config.num_experts):
            rows, slots = np.nonzero(topk_idx == expert)
            mlp = rounded[f"{base}.{config.names.experts}.{expert}"]
            out[rows, slots] = mlp.forward(np.ascontiguousarray(x[rows] / scales))
        if config.has_shared_expert:
            out[:, config.top_k] = rounded[shared].forward(x / scales)
        return numerics.combine(out, topk_weights, hidden), scales, changed

    def _rows_of(self, expert: int, topk_idx: npt.NDArray[np.int32], scores: Float) -> npt.NDArray[np.intp]:
        routed = np.flatnonzero((topk_idx == expert).any(axis=1))
        shown = routed
        missing = min(self._recipe.min_rows, len(scores)) - len(routed)
        if missing > 0:
            others = np.setdiff1d(np.arange(len(scores)), routed)
            closest = others[np.argsort(-scores[others, expert], kind="stable")[:missing]]
            shown = np.concatenate([routed, closest])
        self.report.expert_rows.append((len(routed), len(shown)))
        return shown

    def _mlps(
        self, x: Float, mlps: dict[str, tuple[Mlp, npt.NDArray[np.intp] | None]]
    ) -> tuple[dict[str, Mlp], Float, Tensors]:
        """Round MLPs that read the same rows; `None` = all of them. Returns them, x's scales, and their tensors."""
        maxima = [
            channel_maxima(np.abs(_wide(matrix))) for mlp, _ in mlps.values() for matrix in (mlp.gate, mlp.up)
        ]
        scales = smoothing(channel_maxima(x), maxima, self._recipe.strength)
        rounded: dict[str, Mlp] = {}
        changed: Tensors = {}
        for prefix, (mlp, chosen) in mlps.items():
            rows = x if chosen is None else x[chosen]
            statistics = InputStatistics.of(rows)
            gate, up, down = _wide(mlp.gate), _wide(mlp.up), _wide(mlp.down)
            inner = InputStatistics.of(
                numerics.silu_mul(numerics.matmul_nt(rows, gate), numerics.matmul_nt(rows, up))
            )
            inner_scales = self._smooth(inner.maxima, [down])
            hessian = statistics.divided(scales)
            names = [f"{prefix}.{name}.weight" for name in self._projections(prefix)]
            self._round(names[0], gate * scales, hessian, changed)
            self._round(names[1], up * scales / inner_scales[:, None], hessian, changed)
            self._round(names[2], down * inner_scales, inner.divided(inner_scales), changed)
            rounded[prefix] = Mlp(*(_int8(changed[name]) for name in names))
        return rounded, scales, changed

    def _projections(self, prefix: str) -> tuple[str, str, str]:
        names = self._config.names
        routed = f".{names.mlp}.{names.experts}." in prefix
        return names.projections if routed else ("gate_proj", "up_proj", "down_proj")

    # ------------------------------------------------------------------ one matrix

    def _smooth(self, x_max: Float, readers: list[Float]) -> Float:
        return smoothing(x_max, [channel_maxima(w) for w in readers], self._recipe.strength)

    def _round(self, name: str, w: Float, hessian: npt.NDArray[np.float64], changed: Tensors) -> None:
        w = np.ascontiguousarray(w, np.float32)
        damping = self._recipe.damping
        rounded = gptq(w, hessian, damping=damping) if self._recipe.compensate else round_to_nearest(w)
        self.report.errors[name] = output_error(w, rounded, hessian)
        changed[name] = rounded


def _wide(matrix: numerics.AnyWeight) -> Float:
    return numerics.widen(numerics.dense(matrix))


def _int8(tensor: npt.NDArray[np.float32] | Int8Matrix) -> Int8Matrix:
    assert isinstance(tensor, Int8Matrix)
    return tensor
