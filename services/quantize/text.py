"""Calibration and evaluation text as windows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from bus.errors import ConfigError
from services.demo.corpus import split

Ids = npt.NDArray[np.int64]


def read_texts(files: Sequence[Path]) -> list[str]:
    """Return the texts of UTF-8 files. Raises ConfigError: one cannot be read."""
    try:
        return [path.read_text(encoding="utf-8") for path in files]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text: {error}") from error


def default_texts() -> tuple[list[str], list[str]]:
    """Return (for calibration, for evaluation): the Python standard library, split as for the demo model."""
    return split()


def windows(folder: Path, texts: Sequence[str], count: int, length: int, seed: int) -> Ids:
    """Return up to `count` windows [n, length] of the texts' token ids, drawn without overlap.

    Args:
        folder: the checkpoint, with a tokenizer.json.
        texts: joined in random order.

    Raises:
        ConfigError: no tokenizer, or the texts have fewer than `length` tokens.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: has no tokenizer.json; it is needed to calibrate")
    tokenizer = Tokenizer.from_file(str(path))
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for i in rng.permutation(len(texts)):
        if len(ids) >= 4 * count * length:
            break
        ids += tokenizer.encode(texts[i], add_special_tokens=False).ids
    whole = len(ids) // length
    if whole == 0:
        raise ConfigError(f"text: {len(ids)} tokens are fewer than one window of {length}")
    stream = np.array(ids[: whole * length], np.int64).reshape(whole, length)
    return stream[np.sort(rng.permutation(whole)[:count])]
