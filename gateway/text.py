"""Text and token ids: the tokenizer, the incremental detokeniser and the stop-string matcher. Pure.

A token is not a piece of text: it may hold half a UTF-8 character, or a leading space that only shows
after another token. The detokeniser therefore decodes a short window of ids and emits the difference, and
keeps back what the next token may still change. For byte-level tokenizers what it emits, all together,
equals decoding all ids at once. The stop-string matcher keeps back the shortest tail that may become a
stop string.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from bus.errors import ConfigError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_UNSTABLE_CHARS_MAX = 4  # a UTF-8 character has at most four bytes, each of which may show as one replacement
_WINDOW_TOKENS_MAX = 64
_WINDOW_TOKENS_KEPT = 16
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer(Protocol):
    """Text and token ids, whatever file they come from. Thread-safe."""

    is_byte_level: bool  # every token is bytes, and decoding joins them
    special_token_ids: frozenset[int]

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids that have text."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of `token_ids`; ids without text add nothing."""
        ...

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its exact content, e.g. `<|im_end|>`."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for, which need not be whole characters."""
        ...

    def token_text(self, token_id: int) -> str:
        """Return one token as text; broken characters show as U+FFFD."""
        ...


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`. Thread-safe: encoding releases the GIL."""

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.is_byte_level = '"ByteLevel"' in _decoder_json(tokenizer)
        self._added: dict[int, str] = {
            token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        self.special_token_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def from_folder(cls, folder: Path) -> JsonTokenizer:
        """Read `tokenizer.json` of a checkpoint.

        Raises:
            ConfigError: it is missing or malformed.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"model = {str(folder)!r}: has no tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"{path}: not a tokenizer: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids that have text."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of `token_ids`; ids without text add nothing."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its exact content, e.g. `<|im_end|>`."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for, which need not be whole characters."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece: str | None = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self.is_byte_level and all(char in _BYTE_OF_CHAR for char in piece):
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        match = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """Return one token as text; broken characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


class Detokenizer:
    """Text of a growing sequence of tokens, never half a character.

    `_window` holds the last tokens: those since the last clean boundary, and the piece before it for context.
    `_num_emitted` characters of the window's text have been handed out. Special tokens are left out, but for
    those that are `shown` because a parser looks for them.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, shown: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        ids = {tokenizer.token_id(token) for token in shown} if skip_special_tokens else set()
        self._hidden = tokenizer.special_token_ids - ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._boundary = 0
        self._num_emitted = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Append tokens; return the text that has become certain, perhaps none."""
        self._window += [token_id for token_id in token_ids if token_id not in self._hidden]
        text = self._decode()
        num_stable = self._stable_length(text)
        new = text[self._num_emitted : num_stable]
        if num_stable == len(text):
            self._window = self._window[self._boundary :]
            self._boundary = len(self._window)
            self._num_emitted = len(self._decode())
        elif len(self._window) > _WINDOW_TOKENS_MAX:  # a long run of broken bytes: bound the work
            self._window = self._window[-_WINDOW_TOKENS_KEPT:]
            self._boundary = 0
            self._num_emitted = max(0, len(self._decode()) - (len(text) - num_stable))
        else:
            self._num_emitted = max(self._num_emitted, num_stable)
        return new

    def finish(self) -> str:
        """Return the rest, with U+FFFD where a character was cut off."""
        rest = self._decode()[self._num_emitted :]
        self._num_emitted += len(rest)
        return rest

    def _stable_length(self, text: str) -> int:
        """Return how many characters no later token can change.

        Byte-level: all but a last, unfinished character. Byte fallback: one unfinished character breaks the
        whole run of byte tokens that it ends, so nothing of the run is certain before its end.
        """
        num_broken = len(text) - len(text.rstrip(_REPLACEMENT))
        if self._tokenizer.is_byte_level or len(self._window) > _WINDOW_TOKENS_MAX:
            num_broken = min(num_broken, _UNSTABLE_CHARS_MAX)
        return len(text) - num_broken

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)


class StopMatcher:
    """Finds the first stop string of a text that arrives in pieces.

    First means: the one whose last character comes first; of those that end there, the longest. So the result
    does not depend on how the text was cut into pieces. With `include`, a matched stop string is part of the
    text.
    """

    def __init__(self, stop_strings: Sequence[str], *, include: bool = False) -> None:
        self._stop_strings = tuple(stop_strings)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Append text; return what is certain to come before any stop string, and a matched one if it is to be
        included. Nothing after a match."""
        if self.matched is not None:
            return ""
        buffer = self._held + text
        start = self._find(buffer)
        if self.matched is not None:
            self._held = ""
            return buffer[: start + len(self.matched) * self._include]
        num_held = self._num_to_hold(buffer)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held]

    def finish(self) -> str:
        """Return what was held back, as no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _find(self, buffer: str) -> int:
        best_end, best_start = len(buffer) + 1, -1
        for stop in self._stop_strings:
            start = buffer.find(stop)
            end = start + len(stop)
            if start >= 0 and (end, start) < (best_end, best_start):
                best_end, best_start, self.matched = end, start, stop
        return best_start

    def _num_to_hold(self, buffer: str) -> int:
        longest = 0
        for stop in self._stop_strings:
            for length in range(min(len(stop) - 1, len(buffer)), longest, -1):
                if buffer.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _decoder_json(tokenizer: Any) -> str:
    state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b""
    return state.decode() if isinstance(state, bytes) else str(state)


def _byte_of_char() -> dict[str, int]:
    """The printable characters that byte-level tokenizers write for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
