"""The oracle: the whole model in one process, the slow and obvious way.

The pod, however it is split, batched, chunked, killed and restarted, must give exactly these tokens. It runs
the same numerics as the workers (whose bits do not depend on batching or placement) with a KV cache of its
own: one sequence at a time, the prompt in one pass, then one token per pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bus.control.messages import SamplingParams
from bus.xccl import int8 as transport
from services.model.attention_model import AttentionModel, MoeInput
from services.model.batch import Batch
from services.model.config import load_config
from services.model.expert_model import ExpertModel
from services.model.kv_cache import KvCache
from services.model.sampler import Sampler

Float = npt.NDArray[np.float32]
BLOCK_TOKENS = 16


class ReferenceModel:
    """Both halves of a model, joined."""

    def __init__(
        self, attention: AttentionModel, experts: ExpertModel, folder: str | Path, *, wire_int8: bool = False
    ) -> None:
        self.config = attention.config
        self.folder = folder
        self.attention = attention
        self.experts = experts
        self.wire_int8 = wire_int8

    @classmethod
    def load(
        cls, folder: str | Path, *, kv_cache_dtype: str = "auto", wire_int8: bool = False
    ) -> ReferenceModel:
        """Map a whole checkpoint.

        Args:
            folder: the checkpoint.
            kv_cache_dtype: as the setting `attention.kv_cache_dtype`.
            wire_int8: round what goes to the experts and what comes back, as a pod with `xccl.int8` does.

        Raises:
            ConfigError: no checkpoint, damaged, or not supported.
        """
        config = load_config(folder)
        experts = ExpertModel.load(folder, config, range(config.num_experts), config.has_shared_expert)
        attention = AttentionModel.load(folder, config, kv_cache_dtype=kv_cache_dtype)
        return cls(attention, experts, folder, wire_int8=wire_int8)

    def forward(self, batch: Batch, kv: KvCache) -> Float:
        """Run all layers over a batch; return the final hidden rows [T, hidden]."""
        hidden = self.attention.embed(batch)
        for layer_idx in range(self.config.num_hidden_layers):
            hidden, moe = self.attention.attend(layer_idx, hidden, batch, kv)
            if moe is not None:
                hidden = self.attention.add_moe(hidden, self.expert_outputs(layer_idx, moe), moe)
        return hidden

    def expert_outputs(self, layer_idx: int, moe: MoeInput) -> Float:
        """Return the outputs [T, num_slots, hidden] of every row's experts, one expert at a time."""
        config = self.config
        x = self._sent(moe.x)
        out = np.empty((len(x), config.num_slots, config.hidden_size), dtype=np.float32)
        for expert_id in np.unique(moe.topk_idx):
            rows, slots = np.nonzero(moe.topk_idx == expert_id)
            out[rows, slots] = self.experts.forward(layer_idx, int(expert_id), x[rows])
        if config.has_shared_expert:
            out[:, config.top_k] = self.experts.forward(layer_idx, config.num_experts, x)
        return self._sent(out.reshape(-1, config.hidden_size)).reshape(out.shape)

    def _sent(self, rows: Float) -> Float:
        """Return rows [n, hidden] as they arrive after a journey between attention and experts."""
        return transport.dequantise(*transport.quantise(rows)) if self.wire_int8 else rows

    def logits(self, token_ids: Sequence[int]) -> Float:
        """Return the logits [T, vocab] at every position of one sequence."""
        kv = self._kv_for(len(token_ids))
        return self.attention.logits(self.forward(_rows(token_ids, 0, kv), kv))

    def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """Return the output tokens, the stop token included if one was drawn."""
        limit = min(params.max_tokens, self.config.max_position_embeddings - len(prompt_token_ids))
        kv = self._kv_for(len(prompt_token_ids) + max(limit, 1))
        sampler = Sampler(self.folder, self.config.vocab_size)
        pending, start, output = list(prompt_token_ids), 0, list[int]()
        while len(output) < limit:
            hidden = self.forward(_rows(pending, start, kv), kv)
            start += len(pending)
            allow_stop = len(output) >= params.min_tokens
            token_id = sampler.draw(
                self.attention.logits(hidden[-1:])[0],
                params,
                position=start,
                allow_stop=allow_stop,
                prompt_token_ids=prompt_token_ids,
                output_token_ids=output,
            )
            output.append(token_id)
            pending = [token_id]
            if token_id in params.stop_token_ids or (
                token_id in params.eos_token_ids and not params.ignore_eos
            ):
                break
        return output

    def _kv_for(self, num_tokens: int) -> KvCache:
        return self.attention.allocate_kv(None, -(-num_tokens // BLOCK_TOKENS) or 1, BLOCK_TOKENS)


def _rows(token_ids: Sequence[int], start: int, kv: KvCache) -> Batch:
    """Return consecutive rows of the only sequence, whose blocks are the cache's, in order."""
    return Batch(
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=np.arange(start, start + len(token_ids), dtype=np.int32),
        seq_of_row=np.zeros(len(token_ids), dtype=np.int32),
        block_tables=np.arange(kv.num_blocks, dtype=np.int32)[None],
        block_tokens=kv.block_tokens,
    )
