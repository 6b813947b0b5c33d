"""The demo's corpus as token ids: one stream, and windows of it."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from services.demo.corpus import split

__all__ = ["Windows", "encode", "split"]


def encode(tokenizer: Tokenizer, texts: list[str], separator_id: int) -> np.ndarray:
    """Return the texts as one int32 stream `[separator, text, separator, text, ..., separator]`."""
    pieces = [np.array([separator_id], np.int32)]
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        pieces += [np.array(encoding.ids, np.int32), pieces[0]]
    return np.concatenate(pieces)


class Windows:
    """An endless, seeded stream of training windows; every epoch cuts the stream at another offset."""

    def __init__(self, stream: np.ndarray, seed: int) -> None:
        self.stream = stream
        self.epochs = 0.0
        self._random = np.random.default_rng(seed)
        self._length = 0
        self._starts: list[int] = []

    def batch(self, count: int, length: int) -> np.ndarray:
        """Return int64 `(count, length + 1)` token ids: inputs and, one to the right, their targets."""
        if length != self._length or len(self._starts) < count:
            self._length = length
            offset = int(self._random.integers(length))
            starts = np.arange(offset, len(self.stream) - length - 1, length)
            self._starts = self._random.permutation(starts).tolist()
        picked = [self._starts.pop() for _ in range(count)]
        self.epochs += count * length / len(self.stream)
        return np.stack([self.stream[s : s + length + 1] for s in picked]).astype(np.int64)
