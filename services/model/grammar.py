"""Holding output to a grammar: which tokens may come next. By llguidance.

A request's grammar travels in llguidance's text form and has been checked by the gateway. Which tokens may
come next depends on the grammar and the output tokens, and on nothing else. `Grammars` keeps a matcher per
request so that a step costs one token; a matcher that is missing (a new worker, a preempted request) or does
not fit the request's output is made again by replaying it.

When the text is complete, only end tokens are allowed. With `grammar_after_token_id` (the end of the
reasoning) everything is allowed until that token has come.
"""

from __future__ import annotations

import base64
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import llguidance
import numpy as np
import numpy.typing as npt

from bus.control.messages import SamplingParams

_STATES_MAX = 1024  # requests whose matcher is kept
_GRAMMARS_MAX = 64  # compiled grammars kept for other requests


class GrammarError(Exception):
    """No next token can be found: the grammar is broken, too complex, or the output does not follow it."""


class Grammars:
    """The matchers of one worker. Not thread-safe.

    Args:
        folder: the checkpoint's, for its tokenizer; read when the first grammar comes.
        vocab_size: of the model: length of the masks.
    """

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        self._folder = Path(folder)
        self._vocab_size = vocab_size
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._own_end_ids: tuple[int, ...] = ()
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._states: OrderedDict[str, _State] = OrderedDict()

    def allowed(
        self, request_id: str, params: SamplingParams, output_token_ids: Sequence[int]
    ) -> npt.NDArray[np.bool_] | None:
        """Return [vocab] True where a token may follow the output; None = everywhere.

        Raises:
            GrammarError: see there.
        """
        start = _grammar_start(params, output_token_ids)
        if start is None:
            return None
        text = tuple(output_token_ids[start:])
        ends = frozenset(params.eos_token_ids)
        state = self._states.get(request_id)
        if state is None or not state.precedes(params.grammar, text):
            matcher = self._compile(params.grammar).deep_copy()
            state = _State(params.grammar, matcher, self._own_end_ids)
        self._states[request_id] = state
        self._states.move_to_end(request_id)
        if len(self._states) > _STATES_MAX:
            self._states.popitem(last=False)
        state.follow(text, ends)
        allowed = state.mask(self._vocab_size, [i for i in params.eos_token_ids if i < self._vocab_size])
        if not allowed.any():
            raise GrammarError("no token may follow the text")
        return allowed

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        matcher = self._compiled.get(grammar)
        if matcher is None:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._folder, self._vocab_size)
                self._own_end_ids = tuple(self._tokenizer.eos_tokens)
            matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
            self._compiled[grammar] = matcher
            if len(self._compiled) > _GRAMMARS_MAX:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        if matcher.is_error():
            raise GrammarError(f"the grammar does not compile: {_first_line(matcher.get_error())}")
        return matcher


class _State:
    """One request's matcher and the tokens that it has taken."""

    def __init__(self, grammar: str, matcher: llguidance.LLMatcher, own_end_ids: Sequence[int]) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self._own_end_ids = (
            own_end_ids  # what llguidance takes for end tokens, which need not be the request's
        )
        self._taken: tuple[int, ...] = ()
        self._is_over = False

    def precedes(self, grammar: str, text: tuple[int, ...]) -> bool:
        return grammar == self._grammar and text[: len(self._taken)] == self._taken

    def follow(self, text: tuple[int, ...], ends: frozenset[int]) -> None:
        for token_id in text[len(self._taken) :]:
            self._is_over = self._is_over or token_id in ends  # the end token of a complete text
            if not self._is_over and not self._matcher.consume_token(token_id):
                raise GrammarError(f"token {token_id} does not follow it: {self._error()}")
        self._taken = text

    def mask(self, vocab_size: int, end_ids: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return [vocab] True where a token may come next; an end token only when the text is complete."""
        allowed = np.zeros(vocab_size, dtype=np.bool_)
        is_complete = self._is_over or self._matcher.is_stopped()
        if not is_complete:
            bias = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)[:vocab_size]
            allowed[: len(bias)] = bias > 0
            allowed[[i for i in self._own_end_ids if i < vocab_size]] = False
            is_complete = self._matcher.is_accepting()
        if self._matcher.is_error():
            raise GrammarError(self._error())
        allowed[list(end_ids)] = is_complete
        return allowed

    def _error(self) -> str:
        return _first_line(self._matcher.get_error())


def _grammar_start(params: SamplingParams, output_token_ids: Sequence[int]) -> int | None:
    """Return the index of the first output token that the grammar is about, None while there is none."""
    if not params.grammar:
        return None
    if params.grammar_after_token_id < 0:
        return 0
    try:
        return list(output_token_ids).index(params.grammar_after_token_id) + 1
    except ValueError:
        return None


def load_tokenizer(folder: Path, vocab_size: int) -> llguidance.LLTokenizer:
    """Return the tokens of a checkpoint's `tokenizer.json` or `tiktoken.model`.

    Raises:
        GrammarError: neither file can be used.
    """
    try:
        path = folder / "tokenizer.json"
        if path.is_file():
            text = path.read_text("utf-8")
            return llguidance.LLTokenizer(text, n_vocab=max(vocab_size, _num_tokens(text)))
        return llguidance.LLTokenizer(_tiktoken_vocabulary(folder, vocab_size))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GrammarError(f"the tokenizer in {folder} gives no token masks: {error}") from None


def _num_tokens(tokenizer_json: str) -> int:
    state = json.loads(tokenizer_json)
    ids = [token["id"] for token in state.get("added_tokens", ())]
    vocab = state["model"]["vocab"]
    # A list in unigram models, else a mapping to ids.
    ids.append(len(vocab) - 1 if isinstance(vocab, list) else max(vocab.values(), default=0))
    return int(max(ids)) + 1


class _Vocabulary:
    """What llguidance wants to know of a vocabulary. It asks for the tokens of bytes that the grammar forces."""

    def __init__(self, tokens: list[bytes], special_token_ids: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.bos_token_id: int | None = None
        self.eos_token_id = special_token_ids[0] if special_token_ids else len(tokens) - 1
        special = frozenset(special_token_ids)
        self._ids = {token: i for i, token in enumerate(tokens) if i not in special}
        self._length_max = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the ids of the longest tokens that fit, one after the other."""
        data = text.encode() if isinstance(text, str) else text
        ids: list[int] = []
        while data:
            ends = range(min(len(data), self._length_max), 0, -1)
            length = next((end for end in ends if data[:end] in self._ids), 0)
            if not length:
                raise ValueError(f"byte {data[0]} is no token")
            ids.append(self._ids[data[:length]])
            data = data[length:]
        return ids


def _tiktoken_vocabulary(folder: Path, vocab_size: int) -> llguidance.TokenizerWrapper:
    tokens = [b""] * vocab_size
    for line in (folder / "tiktoken.model").read_bytes().splitlines():
        encoded, rank = line.split()
        tokens[int(rank)] = base64.b64decode(encoded)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    added = {int(i): str(entry["content"]) for i, entry in config.get("added_tokens_decoder", {}).items()}
    special = [token_id for token_id, token in enumerate(tokens) if not token]
    for token_id in special:
        tokens[token_id] = added.get(token_id, f"<|reserved_token_{token_id}|>").encode()
    return llguidance.TokenizerWrapper(_Vocabulary(tokens, special))


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0][:200]
