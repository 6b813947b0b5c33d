"""Tokenizer, detokeniser, stop strings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models

from bus.errors import ConfigError
from gateway.text import Detokenizer, JsonTokenizer, StopMatcher
from tests.harness.gateway_world import END, TOKENIZER

CUTS = st.lists(st.integers(1, 5), max_size=60)


def pieces(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """Cut `ids` into the given lengths, the rest one by one."""
    out, start = [], 0
    for length in [*cuts, *[1] * len(ids)]:
        if start < len(ids):
            out.append(ids[start : start + length])
            start += length
    return out


def byte_fallback_tokenizer() -> JsonTokenizer:
    """Llama-like: pieces with U+2581 for space, and byte pieces."""
    words = ["\u2581a", "\u2581bc", "d", "e\u2581"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {w: 256 + n for n, w in enumerate(words)}
    tokenizer = HfTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return JsonTokenizer(tokenizer)


BYTE_FALLBACK = byte_fallback_tokenizer()


def stream(tokenizer: JsonTokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(piece) for piece in pieces(ids, cuts)), detokenizer.finish()]


@given(data=st.binary(max_size=200), cuts=CUTS)
def test_any_bytes_in_any_pieces_give_the_same_text_as_all_at_once(data: bytes, cuts: list[int]) -> None:
    texts = stream(TOKENIZER, list(data), cuts)
    assert "".join(texts) == TOKENIZER.decode(list(data), skip_special_tokens=True)


@given(data=st.lists(st.sampled_from([0x80, 0xBF, 0xE2, 0xF0, 0x9F, 0x41]), max_size=300), cuts=CUTS)
def test_long_runs_of_broken_bytes(data: list[int], cuts: list[int]) -> None:
    texts = stream(TOKENIZER, data, cuts)
    assert "".join(texts) == TOKENIZER.decode(data, skip_special_tokens=True)


@given(text=st.text(max_size=60), cuts=CUTS)
def test_valid_text_never_shows_half_a_character(text: str, cuts: list[int]) -> None:
    texts = stream(TOKENIZER, list(text.encode()), cuts)
    assert "".join(texts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in texts)


@given(
    words=st.lists(st.sampled_from(["\u2581a", "\u2581bc", "d", "e\u2581", "é", "🙂"]), max_size=40),
    cuts=CUTS,
)
def test_byte_fallback_pieces(words: list[str], cuts: list[int]) -> None:
    ids: list[int] = []
    for word in words:
        token_id = BYTE_FALLBACK.token_id(word)
        ids += [token_id] if token_id is not None else list(word.encode())
    texts = stream(BYTE_FALLBACK, ids, cuts)
    assert "".join(texts) == BYTE_FALLBACK.decode(ids, skip_special_tokens=True)


def test_a_character_appears_when_its_last_byte_comes() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push([byte]) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]


def test_special_tokens_are_skipped_or_not() -> None:
    assert stream(TOKENIZER, [97, END, 98], []) == ["a", "", "b", ""]
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=False)
    assert detokenizer.push([97, END]) == "a<|end|>"


def test_token_bytes() -> None:
    assert TOKENIZER.token_bytes(0xC3) == b"\xc3"
    assert TOKENIZER.token_bytes(END) == b"<|end|>"
    assert TOKENIZER.token_bytes(5000) == b""
    assert BYTE_FALLBACK.token_bytes(0xC3) == b"\xc3"
    assert BYTE_FALLBACK.token_bytes(256) == b" a"


# --------------------------------------------------------------------------- stop strings


def full_text_search(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The slow twin: the first position at which some stop string ends; the longest of those."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=6), max_size=4),
    cuts=CUTS,
)
def test_the_matcher_equals_a_search_in_the_full_text(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    out = ""
    for piece in pieces(list(text.encode()), cuts):
        out += matcher.push(bytes(piece).decode())
        so_far = full_text_search(text, stops)[0]
        assert so_far.startswith(out)
    out += matcher.finish()
    assert (out, matcher.matched) == full_text_search(text, stops)


def test_nothing_is_held_back_without_need() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.push("hello\n") == "hello"
    assert matcher.push("world") == "\nworld"
    assert matcher.push("\nUser") == ""
    assert matcher.finish() == "\nUser"


def test_nothing_follows_a_match() -> None:
    matcher = StopMatcher(["x"])
    assert matcher.push("axb") == "a"
    assert matcher.push("more") == "" and matcher.finish() == ""


# --------------------------------------------------------------------------- files


def test_a_missing_or_broken_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        JsonTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        JsonTokenizer.from_folder(tmp_path)
