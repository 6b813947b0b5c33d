"""llama.cpp through llama-cpp-python: `python -m services.bench.engines.llama_cpp FILE.gguf THREADS`."""

from __future__ import annotations

import ctypes
import sys
from importlib import import_module
from typing import Any

import numpy as np

from services.bench.engines.serving import Ids, serve

BATCH_TOKENS = 512


class LlamaCppEngine:
    """A context whose sequences are the batch."""

    def __init__(self, path: str, threads: int) -> None:
        self._api: Any = import_module("llama_cpp")  # an extra
        self._threads = threads
        self._api.llama_backend_init()
        parameters = self._api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = self._api.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp refuses {path}")
        self.vocab_size = int(self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model)))
        self._context: Any = None
        self._batch = self._api.llama_batch_init(BATCH_TOKENS, 0, 1)

    def reset(self, batch: int, num_tokens: int) -> None:
        """See `Engine`."""
        if self._context is not None:
            self._api.llama_free(self._context)
        parameters = self._api.llama_context_default_params()
        parameters.n_seq_max = batch
        parameters.n_ctx = batch * (-(-num_tokens // 256) * 256)
        parameters.n_batch = parameters.n_ubatch = BATCH_TOKENS
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.type_k = parameters.type_v = self._api.GGML_TYPE_F32
        self._context = self._api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {batch} sequences of {num_tokens} tokens")

    def prefill(self, sequence: int, prompt: Ids) -> int:
        """See `Engine`."""
        for start in range(0, len(prompt), BATCH_TOKENS):
            chunk = prompt[start : start + BATCH_TOKENS]
            wanted = [start + i == len(prompt) - 1 for i in range(len(chunk))]
            self._decode(chunk, range(start, start + len(chunk)), [sequence] * len(chunk), wanted)
        return int(self._best(len(chunk) - 1))

    def step(self, token_ids: Ids, position: int) -> Ids:
        """See `Engine`."""
        count = len(token_ids)
        self._decode(token_ids, [position] * count, range(count), [True] * count)
        return np.array([self._best(i) for i in range(count)], np.int64)

    def _decode(self, token_ids: Ids, positions: object, sequences: object, wanted: list[bool]) -> None:
        batch = self._batch
        batch.n_tokens = len(token_ids)
        rows = zip(token_ids, positions, sequences, wanted, strict=True)  # type: ignore[call-overload]
        for i, (token, position, sequence, want) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), int(position), want
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = int(sequence)
        if self._api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _best(self, row: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, row)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(pointer, (self.vocab_size,)).argmax())


if __name__ == "__main__":
    engine = LlamaCppEngine(sys.argv[1], int(sys.argv[2]))
    serve(engine, engine.vocab_size)
