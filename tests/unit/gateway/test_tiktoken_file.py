"""`tiktoken.model` checkpoints: equal to a `tokenizer.json` of the same merges, and what is malformed."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import services.demo
from bus.errors import ConfigError
from gateway.text import Detokenizer, JsonTokenizer
from gateway.tiktoken_file import _MOONSHOT, TiktokenTokenizer

DEMO = Path(services.demo.__file__).parent
JSON = json.loads((DEMO / "tokenizer.json").read_text())
PATTERN = JSON["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
TWIN = JsonTokenizer.from_folder(DEMO)
NUM_RANKS = TWIN.vocab_size - 1  # the demo has one added token, at id 0; ranks begin behind it


def write(folder: Path, lines: list[bytes] | None = None, **config: Any) -> Path:
    if lines is None:
        lines = [base64.b64encode(TWIN.token_bytes(rank + 1)) + b" %d" % rank for rank in range(NUM_RANKS)]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pat_str": PATTERN, **config}))
    return folder


ADDED = {
    str(NUM_RANKS): {"content": "[BOS]", "special": True},
    str(NUM_RANKS + 2): {"content": "<|im_end|>", "special": True},
    str(NUM_RANKS + 3): {"content": "<|tool_call_begin|>", "special": False},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TiktokenTokenizer:
    folder = write(tmp_path_factory.mktemp("tiktoken"), added_tokens_decoder=ADDED)
    return TiktokenTokenizer.from_folder(folder)


TEXT = st.text() | st.text("ab 1\n\t'sé漢🙂_(", max_size=80)


@given(text=TEXT)
def test_it_is_the_tokenizer_json_of_the_same_merges(tokenizer: TiktokenTokenizer, text: str) -> None:
    assume(not any(entry["content"] in text for entry in ADDED.values()))
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert [token_id + 1 for token_id in ids] == TWIN.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.encode("utf-8", "replace").decode()


@given(data=st.binary(max_size=100), cuts=st.lists(st.integers(0, 100), max_size=20))
def test_streams_never_hold_half_a_character(
    tokenizer: TiktokenTokenizer, data: bytes, cuts: list[int]
) -> None:
    ids = [tokenizer.token_id(chr(byte)) if byte < 128 else _byte_id(tokenizer, byte) for byte in data]
    known = [token_id for token_id in ids if token_id is not None]
    detokenizer = Detokenizer(tokenizer)
    places = [0, *sorted({min(cut, len(known)) for cut in cuts}), len(known)]
    texts = [detokenizer.push(known[a:b]) for a, b in pairwise(places)]
    assert "".join([*texts, detokenizer.finish()]) == tokenizer.decode(known, skip_special_tokens=True)


def _byte_id(tokenizer: TiktokenTokenizer, byte: int) -> int | None:
    return next((i for i in range(256) if tokenizer.token_bytes(i) == bytes([byte])), None)


def test_added_tokens(tokenizer: TiktokenTokenizer) -> None:
    ids = tokenizer.encode("[BOS]hi<|im_end|><|tool_call_begin|>", add_special_tokens=True)
    assert ids[0] == NUM_RANKS and ids[-2:] == [NUM_RANKS + 2, NUM_RANKS + 3]
    assert tokenizer.token_id("<|im_end|>") == NUM_RANKS + 2 and tokenizer.token_id("<none>") is None
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi<|tool_call_begin|>"
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith("[BOS]hi<|im_end|>")
    assert tokenizer.token_text(NUM_RANKS + 1) == f"<|reserved_token_{NUM_RANKS + 1}|>"
    assert tokenizer.vocab_size == NUM_RANKS + 256 and tokenizer.token_bytes(10**6) == b""


def test_moonshots_pattern_is_chosen_by_class_and_keeps_chinese_apart(tmp_path: Path) -> None:
    folder = write(tmp_path, pat_str=None, tokenizer_class="TikTokenTokenizer")
    tokenizer = TiktokenTokenizer.from_folder(folder)
    text = "Hello世界 Wörld's 12345\n\n  x"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True), skip_special_tokens=True) == text
    assert tokenizer._encoding._pat_str == _MOONSHOT


def test_runs_that_the_library_cannot_take_at_once(tokenizer: TiktokenTokenizer) -> None:
    for text in ("a" * 60_000, " " * 60_000, "ab " * 200_000):
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("lines", "config", "says"),
    [
        ([b"!!! 0"], {}, "tiktoken.model"),
        ([b"YQ== x"], {}, "tiktoken.model"),
        ([b"YQ== 1"], {}, "ranks must be 0..n-1"),
        ([b"YQ== 0", b"Yg== 0"], {}, "ranks must be 0..n-1"),
        ([], {}, "ranks must be 0..n-1"),
        (None, {"pat_str": "(a"}, "not a tokenizer"),
        (None, {"pat_str": None, "tokenizer_class": "Unknown"}, "pat_str"),
    ],
)
def test_a_malformed_checkpoint(
    tmp_path: Path, lines: list[bytes] | None, config: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        TiktokenTokenizer.from_folder(write(tmp_path, lines, **config))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        TiktokenTokenizer.from_folder(tmp_path)
