"""The text the demo model learns: the standard library's own source, found on every machine with Python.

A document is one file (or one topic of `pydoc_data.topics`, the language reference behind `help()`). Whole
documents are held out by the hash of their name, so the split is the same on every machine. Documents are
joined into one stream of token ids, each one opened and closed by the separator. Everything here is under
the PSF licence.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

EXCLUDED = {
    "test", "tests", "idlelib", "idle_test", "turtledemo", "lib2to3", "encodings", "pydoc_data",
    "site-packages", "dist-packages", "_bundled", "__pycache__",
}  # fmt: skip
HELD_OUT_PER_MILLE = 35


def documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED & set(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if text:
            yield name.as_posix(), text + "\n"
    for topic, text in sorted(topics.items()):
        yield f"pydoc_data/topics/{topic}", text.strip() + "\n"


def is_held_out(name: str) -> bool:
    """Whether a document is kept from training, by the hash of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def split() -> tuple[list[str], list[str]]:
    """Return the texts for training and the texts held out."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in documents():
        parts[is_held_out(name)].append(text)
    return parts
