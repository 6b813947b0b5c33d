"""All experts of the model, in the process that computes attention (the paper's colocated experts of prefill).

Weights are mapped, so however many processes map an expert, its bytes are in memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bus.xccl import int8 as transport
from services.model.attention_model import MoeInput
from services.model.checkpoint import Progress
from services.model.expert_model import ExpertModel
from services.model.model_config import ModelConfig
from services.steps.executor import StepAbandoned

Float32Array = npt.NDArray[np.float32]


def load_experts(
    folder: str | Path, config: ModelConfig, expert_ids: Sequence[int], progress: Progress | None = None
) -> ExpertModel:
    """Map these experts of every layer, and the shared one. Raises ConfigError."""
    return ExpertModel.load(folder, config, expert_ids, shared=config.has_shared_expert, progress=progress)


class LocalExperts:
    """`services.steps.executor.ExpertsSide` without an exchange. One thread.

    Args:
        model: all experts.
        beat: called before each expert, so that a long prompt is not taken for a hang.
        wire_int8: treat rows as if they had travelled in INT8, as they do elsewhere in the pod: same bits everywhere.
    """

    def __init__(self, model: ExpertModel, beat: Callable[[], None], *, wire_int8: bool = False) -> None:
        self._model, self._beat, self._wire_int8 = model, beat, wire_int8
        self._config = model.config
        self._out = np.empty((0, self._config.num_slots, self._config.hidden_size), np.float32)
        self.num_retries = 0
        self.is_waiting = False  # never for another process
        self.expert_rows = 0
        self.shared_rows = 0
        self.wanted: Callable[[], bool] = lambda: True

    def exchange(self, layer: int, moe: MoeInput, step_seq: int) -> Float32Array:
        """See `ExpertsSide`; rows of one expert are multiplied together."""
        if not self.wanted():
            raise StepAbandoned
        num_rows = moe.x.shape[0]
        if self._out.shape[0] < num_rows:
            self._out = np.empty((num_rows, *self._out.shape[1:]), np.float32)
        out = self._out[:num_rows]
        x = self._sent(moe.x)
        order = np.argsort(moe.topk_idx, axis=None, kind="stable")
        experts, firsts = np.unique(moe.topk_idx.ravel()[order], return_index=True)
        for expert, picked in zip(experts, np.split(order, firsts)[1:], strict=True):
            self._beat()
            rows, slots = np.divmod(picked, moe.topk_idx.shape[1])
            out[rows, slots] = self._model.forward(layer, int(expert), x[rows])
            self.expert_rows += len(rows)
        if self._config.has_shared_expert:
            out[:, -1] = self._shared(layer, x)
        return self._sent(out.reshape(-1, out.shape[-1])).reshape(out.shape)

    def shared(self, layer: int, x: Float32Array) -> Float32Array:
        """Return the shared expert's output [num_rows, hidden]."""
        return self._sent(self._shared(layer, self._sent(x)))

    def _shared(self, layer: int, x: Float32Array) -> Float32Array:
        self._beat()
        self.shared_rows += len(x)
        return self._model.forward(layer, self._config.num_experts, x)

    def _sent(self, rows: Float32Array) -> Float32Array:
        return transport.dequantise(*transport.quantise(rows)) if self._wire_int8 else rows

    def close(self) -> None:
        """Nothing is held but the model."""

    def counters(self) -> dict[str, int]:
        """Return what was counted here, by name."""
        return {"expert_rows": self.expert_rows, "shared_rows": self.shared_rows}
