"""transformers: `python -m services.bench.engines.transformers CHECKPOINT THREADS [EXPERTS_IMPLEMENTATION]`.

`grouped_mm` is its fastest way through the experts on a CPU. All prompts of a batch are as long as each other, so no
padding is needed; the caches of the sequences are joined after prefill.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import numpy as np

from services.bench.engines.serving import Ids, serve


class TransformersEngine:
    """A float32 model with its own cache."""

    def __init__(self, folder: str, threads: int, experts: str) -> None:
        torch: Any = import_module("torch")  # extras
        transformers: Any = import_module("transformers")
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch, self._new_cache = torch, transformers.DynamicCache
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation=experts
        ).eval()
        self.vocab_size = int(self._model.config.vocab_size)
        self._caches: list[Any] = []
        self._joined: Any = None

    def reset(self, batch: int, num_tokens: int) -> None:
        """See `Engine`."""
        self._caches, self._joined = [], None

    def prefill(self, sequence: int, prompt: Ids) -> int:
        """See `Engine`."""
        cache = self._new_cache(config=self._model.config)
        out = self._model(self._torch.from_numpy(prompt)[None], past_key_values=cache, logits_to_keep=1)
        self._caches.append(cache)
        return int(out.logits[0, -1].argmax())

    def step(self, token_ids: Ids, position: int) -> Ids:
        """See `Engine`."""
        if self._joined is None:
            self._joined = self._join()
        out = self._model(self._torch.from_numpy(token_ids)[:, None], past_key_values=self._joined)
        return np.asarray(out.logits[:, -1].argmax(-1).numpy(), np.int64)

    def _join(self) -> Any:
        joined = self._new_cache(config=self._model.config)
        for index in range(len(self._caches[0].layers)):
            layers = [cache.layers[index] for cache in self._caches]
            joined.update(
                self._torch.cat([layer.keys for layer in layers]),
                self._torch.cat([layer.values for layer in layers]),
                index,
            )
        self._caches = []
        return joined


if __name__ == "__main__":
    engine = TransformersEngine(
        sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "grouped_mm"
    )
    serve(engine, engine.vocab_size)
