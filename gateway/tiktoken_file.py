"""`tiktoken.model` checkpoints (Kimi K2): the same interface over tiktoken that a `tokenizer.json` has.

The file holds the byte sequences and their ranks. What else makes the tokenizer is in `tokenizer_config.json`:
the added tokens, and `pat_str`, the pattern that splits text, where it is given. Checkpoints that keep the
pattern in Python code are known by the name of their tokenizer class; that code is never run.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import tiktoken

from bus.errors import ConfigError

_NUM_RESERVED = 256  # ids behind the ranks: added tokens, and reserved names for the rest
_WORD_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
# Moonshot's: Chinese runs alone, then words by case, numbers of up to three digits, punctuation, blank space.
_MOONSHOT = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_WORD_END}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_WORD_END}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_PATTERNS = {"TikTokenTokenizer": _MOONSHOT}
_RUN_CHARS_MAX = 25_000  # of blank space or of its absence: longer runs cost the library quadratic time
_PIECE_CHARS_MAX = 400_000  # more at once makes the library fail


class TiktokenTokenizer:
    """Text and token ids. Thread-safe.

    Args:
        ranks: byte sequence -> id, for all of them.
        pattern: what splits a text before bytes are merged.
        added: id -> (text, whether it is special).
    """

    is_byte_level = True

    def __init__(
        self, ranks: Mapping[bytes, int], pattern: str, added: Mapping[int, tuple[str, bool]]
    ) -> None:
        self._added = {token_id: text for token_id, (text, _) in added.items()}
        self._ids = {text: token_id for token_id, text in self._added.items()}
        self.special_token_ids = frozenset(
            token_id for token_id, (_, is_special) in added.items() if is_special
        )
        self._encoding = tiktoken.Encoding(
            "checkpoint", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(self._ids)
        )
        self._bytes = {token_id: data for data, token_id in ranks.items()}

    @classmethod
    def from_folder(cls, folder: Path) -> TiktokenTokenizer:
        """Read `tiktoken.model` and `tokenizer_config.json` of a checkpoint.

        Raises:
            ConfigError: a file is missing or malformed, or nothing says how text is split.
        """
        config = _read_config(folder / "tokenizer_config.json")
        ranks = _read_ranks(folder / "tiktoken.model")
        pattern = config.get("pat_str") or _PATTERNS.get(_class_name(config))
        if not isinstance(pattern, str):
            rule = f"must give pat_str, or a tokenizer_class that is known: {', '.join(_PATTERNS)}"
            raise ConfigError(f"{folder / 'tokenizer_config.json'}: {rule}")
        try:
            return cls(ranks, pattern, _added_tokens(config, len(ranks)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{folder / 'tiktoken.model'}: not a tokenizer: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids that have text."""
        return len(self._bytes) + len(self._added)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`; added tokens in it are tokens. Such files add no others."""
        del add_special_tokens
        ids: list[int] = []
        for piece in _pieces(text):
            ids += self._encoding.encode(piece, allowed_special="all", disallowed_special=())
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of `token_ids`; ids without text add nothing."""
        hidden = self.special_token_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(token_id) for token_id in token_ids if token_id not in hidden)
        return data.decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its exact content, e.g. `<|im_end|>`."""
        known = self._ids.get(token)
        return known if known is not None else self._encoding._mergeable_ranks.get(token.encode())

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for, which need not be whole characters."""
        if token_id in self._added:
            return self._added[token_id].encode()
        return self._bytes.get(token_id, b"")

    def token_text(self, token_id: int) -> str:
        """Return one token as text; broken characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


def _read_config(path: Path) -> dict[str, object]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                encoded, rank = line.split()
                ranks[base64.b64decode(encoded, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        raise ConfigError(f"{path}: {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ConfigError(f"{path}: ranks must be 0..n-1, each once")
    return ranks


def _class_name(config: Mapping[str, object]) -> str:
    return str(config.get("tokenizer_class", ""))


def _added_tokens(config: Mapping[str, object], num_ranks: int) -> dict[int, tuple[str, bool]]:
    """Return every id behind the ranks: what the settings name, and reserved names for the rest."""
    added = {
        token_id: (f"<|reserved_token_{token_id}|>", True)
        for token_id in range(num_ranks, num_ranks + _NUM_RESERVED)
    }
    named = config.get("added_tokens_decoder")
    for key, entry in named.items() if isinstance(named, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and str(key).isdecimal():
            added[int(key)] = (entry["content"], bool(entry.get("special", False)))
    return added


def _pieces(text: str) -> list[str]:
    """Cut what the library cannot take at once: long texts, and long runs with or without blank space."""
    pieces: list[str] = []
    for start in range(0, len(text), _PIECE_CHARS_MAX):
        part = text[start : start + _PIECE_CHARS_MAX]
        begin = run = 0
        was_space = False
        if len(part) <= _RUN_CHARS_MAX:
            pieces.append(part)
            continue
        for place, char in enumerate(part):
            run = run + 1 if char.isspace() == was_space else 1
            was_space = char.isspace()
            if run > _RUN_CHARS_MAX:
                pieces.append(part[begin:place])
                begin, run = place, 1
        pieces.append(part[begin:])
    return pieces
