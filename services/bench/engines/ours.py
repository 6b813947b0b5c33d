"""Our engine in one process and one thread: `python -m services.bench.engines.ours CHECKPOINT`."""

from __future__ import annotations

import sys

import numpy as np

from services.bench.engines.serving import Ids, serve
from services.model.batch import Batch
from services.model.kv_cache import KvCache
from services.model.reference import BLOCK_TOKENS, ReferenceModel

CHUNK_TOKENS = 512


class OurEngine:
    """Both halves of the model in this process, with the paged cache of a pod."""

    def __init__(self, folder: str) -> None:
        self._model = ReferenceModel.load(folder)
        self.vocab_size = self._model.config.vocab_size
        self._kv: KvCache
        self._tables = np.zeros((0, 0), np.int32)

    def reset(self, batch: int, num_tokens: int) -> None:
        """See `Engine`."""
        blocks = -(-num_tokens // BLOCK_TOKENS)
        self._tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
        self._kv = self._model.attention.allocate_kv(None, batch * blocks, BLOCK_TOKENS)

    def prefill(self, sequence: int, prompt: Ids) -> int:
        """See `Engine`."""
        for start in range(0, len(prompt), CHUNK_TOKENS):
            chunk = prompt[start : start + CHUNK_TOKENS]
            positions = np.arange(start, start + len(chunk), dtype=np.int32)
            hidden = self._forward(chunk, positions, np.full(len(chunk), sequence, np.int32))
        return int(self._model.attention.logits(hidden[-1:]).argmax())

    def step(self, token_ids: Ids, position: int) -> Ids:
        """See `Engine`."""
        count = len(token_ids)
        hidden = self._forward(
            token_ids, np.full(count, position, np.int32), np.arange(count, dtype=np.int32)
        )
        return np.asarray(self._model.attention.logits(hidden).argmax(axis=1), np.int64)

    def _forward(self, token_ids: Ids, positions: np.ndarray, sequences: np.ndarray) -> np.ndarray:
        batch = Batch(
            np.ascontiguousarray(token_ids, np.int64), positions, sequences, self._tables, BLOCK_TOKENS
        )
        return self._model.forward(batch, self._kv)


if __name__ == "__main__":
    engine = OurEngine(sys.argv[1])
    serve(engine, engine.vocab_size)
