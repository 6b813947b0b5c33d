"""Grammars as token masks: what may follow, how a text ends, and that replaying it changes nothing."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest
import tokenizers

from bus.control.messages import SamplingParams
from services.model.grammar import GrammarError, Grammars
from services.model.sampler import Sampler
from tests.conftest import GOLDENS

FOLDER = GOLDENS / "qwen3_moe"
TOKENIZER = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
VOCAB_SIZE = json.loads((FOLDER / "config.json").read_text())["vocab_size"]
EOS = (2,)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
BY_SCHEMA = llguidance.LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})


def params(grammar: str, **fields: Any) -> SamplingParams:
    given = {"max_tokens": 200, "temperature": 1.0, "seed": 7, "eos_token_ids": EOS, "grammar": grammar}
    return SamplingParams(**(given | fields))


def generate(given: SamplingParams, *, forget_every: int = 0, count: int = 200) -> list[int]:
    """Draw from random logits; `forget_every` steps a fresh worker goes on."""
    rng = np.random.default_rng(1)
    sampler = Sampler(FOLDER, VOCAB_SIZE)
    output: list[int] = []
    for step in range(count):
        if forget_every and step % forget_every == 0:
            sampler = Sampler(FOLDER, VOCAB_SIZE)
        row = rng.standard_normal(VOCAB_SIZE).astype(np.float32)
        output.append(
            sampler.draw(
                row, given, request_id="a", position=5 + step, allow_stop=True, output_token_ids=output
            )
        )
        if output[-1] in given.eos_token_ids and not given.ignore_eos:
            break
    return output


def text(token_ids: list[int]) -> str:
    return str(TOKENIZER.decode(token_ids, skip_special_tokens=True))


@pytest.mark.parametrize("seed", range(5))
def test_output_follows_the_schema(seed: int) -> None:
    output = generate(params(BY_SCHEMA, seed=seed, logit_bias=((EOS[0], 3.0),)))
    if output[-1] in EOS:
        assert json.loads(text(output)).keys() == {"name", "age"}
    else:
        assert text(output).startswith('{"name":')


def test_choice_and_its_end() -> None:
    output = generate(params(llguidance.LLMatcher.grammar_from_regex("yes|no")))
    assert text(output) in ("yes", "no") and output[-1] in EOS


def test_a_new_worker_draws_the_same_tokens() -> None:
    given = params(BY_SCHEMA, frequency_penalty=0.3, repetition_penalty=1.1, min_p=0.01)
    whole = generate(given)
    assert generate(given, forget_every=1) == whole
    assert generate(given, forget_every=7) == whole


def test_ending_is_repeated_when_eos_is_ignored() -> None:
    output = generate(params(llguidance.LLMatcher.grammar_from_regex("ab"), ignore_eos=True), count=12)
    assert text(output) == "ab" and output[-6:] == [EOS[0]] * 6
    assert generate(params(llguidance.LLMatcher.grammar_from_regex("ab"), ignore_eos=True), count=12,
                    forget_every=1) == output  # fmt: skip


def test_a_complete_text_ends_even_before_min_tokens() -> None:
    given = params(llguidance.LLMatcher.grammar_from_regex("a"))
    (letter,) = TOKENIZER.encode("a", add_special_tokens=False).ids
    row = np.zeros(VOCAB_SIZE, dtype=np.float32)
    token_id = Sampler(FOLDER, VOCAB_SIZE).draw(
        row, given, position=9, allow_stop=False, output_token_ids=[letter]
    )
    assert token_id in EOS


def test_the_grammar_waits_for_its_token() -> None:
    given = params(llguidance.LLMatcher.grammar_from_regex("a"), grammar_after_token_id=9)
    grammars = Grammars(FOLDER, VOCAB_SIZE)
    assert grammars.allowed("a", given, [5, 6]) is None
    allowed = grammars.allowed("a", given, [5, 6, 9])
    assert allowed is not None and text([int(i) for i in np.flatnonzero(allowed)]) == "a"


def test_several_end_tokens() -> None:
    given = params(llguidance.LLMatcher.grammar_from_regex("a?"), eos_token_ids=(1, 2, VOCAB_SIZE + 3))
    allowed = Grammars(FOLDER, VOCAB_SIZE).allowed("a", given, [])
    assert allowed is not None and allowed[1] and allowed[2]


def test_states_of_requests_do_not_mix() -> None:
    grammars = Grammars(FOLDER, VOCAB_SIZE)
    given = params(llguidance.LLMatcher.grammar_from_regex("(ab)*c"))
    a, b, c = (TOKENIZER.encode(letter, add_special_tokens=False).ids[0] for letter in "abc")
    for request_id, output in (("1", [a]), ("2", []), ("1", [a, b]), ("2", [c]), ("1", [c])):
        alone = Grammars(FOLDER, VOCAB_SIZE).allowed("x", given, output)
        np.testing.assert_array_equal(grammars.allowed(request_id, given, output), alone)


@pytest.mark.parametrize("grammar", ["start: nothing", '{"grammars":[{"json_schema":{"type":"x"}}]}'])
def test_a_broken_grammar_is_an_error(grammar: str) -> None:
    with pytest.raises(GrammarError, match="does not compile"):
        Grammars(FOLDER, VOCAB_SIZE).allowed("a", params(grammar), [])


def test_output_that_does_not_follow_is_an_error() -> None:
    with pytest.raises(GrammarError, match="does not follow"):
        Grammars(FOLDER, VOCAB_SIZE).allowed("a", params(BY_SCHEMA), [100, 101])


def test_a_tiktoken_vocabulary(tmp_path: Path) -> None:
    tokens = [bytes([i]) for i in range(256)] + [b"yes"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    config = {"added_tokens_decoder": {"257": {"content": "<end>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    given = params(llguidance.LLMatcher.grammar_from_regex("yes"), eos_token_ids=(257,))
    grammars = Grammars(tmp_path, 260)
    first = grammars.allowed("a", given, [])
    assert first is not None and set(np.flatnonzero(first)) == {256}  # the longest token of forced text
    last = grammars.allowed("a", given, [256])
    assert last is not None and set(np.flatnonzero(last)) == {257}


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match="no token masks"):
        Grammars(tmp_path, 260).allowed("a", params(BY_SCHEMA), [])
