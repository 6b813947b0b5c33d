"""OpenAI's JSON: from updates of choices to response bodies and stream chunks. Pure.

`return_token_ids` follows vLLM: a completion choice has `prompt_token_ids` and `token_ids`; a chat
response has `prompt_token_ids` beside its choices. In a stream the prompt's come once, in the first
chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bus.control.messages import TokenLogprob
from gateway.chat_text import ChatText, delta_of, message_of
from gateway.choices import ChoicePlan, Update
from gateway.schemas import JsonObject
from gateway.text import Tokenizer
from gateway.tools import Reading

_LOGPROB_MIN = -9999.0  # JSON has no infinity


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every body of one response has in common."""

    response_id: str
    created_s: int  # wall clock
    model: str
    include_usage: bool = False  # of a stream
    return_token_ids: bool = False
    prompt_logprobs: bool = False  # vLLM's, of a whole body
    include_reasoning: bool = True

    def wrap(
        self, kind: str, choices: list[JsonObject], usage: JsonObject | None, *, chunk: bool
    ) -> JsonObject:
        """Return a whole body or a chunk."""
        body: JsonObject = {
            "id": self.response_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }
        if not chunk or self.include_usage:
            body["usage"] = usage
        return body


class Format(ABC):
    """How one kind of response looks."""

    def __init__(self, envelope: Envelope, plans: Sequence[ChoicePlan], tokenizer: Tokenizer) -> None:
        self.envelope = envelope
        self.plans = plans
        self.tokenizer = tokenizer

    @abstractmethod
    def first_chunks(self) -> list[JsonObject]:
        """Return the chunks that a stream starts with, before any token."""

    @abstractmethod
    def chunk(self, update: Update) -> JsonObject | None:
        """Return the chunk for an update, None when it says nothing to the client yet."""

    @abstractmethod
    def usage_chunk(self, usage: JsonObject) -> JsonObject:
        """Return the last chunk of a stream that wants usage."""

    @abstractmethod
    def whole(self, updates: Sequence[Update], usage: JsonObject) -> JsonObject:
        """Return the body of a response that is not streamed; one update per choice, in order."""

    def prompt_logprobs(self, plan: ChoicePlan, update: Update) -> list[JsonObject | None] | None:
        """Return vLLM's `prompt_logprobs`: per prompt token a mapping from token id, None for the first."""
        if not self.envelope.prompt_logprobs:
            return None
        found: list[JsonObject | None] = [None]
        for entry in update.prompt_logprobs:
            ranked = zip(entry.top_token_ids, entry.top_logprobs, range(1, 1 << 31), strict=False)
            tokens = [*ranked, (entry.token_id, entry.logprob, entry.rank)]
            found.append(
                {
                    str(token_id): {
                        "logprob": _finite(logprob),
                        "rank": rank,
                        "decoded_token": self.tokenizer.token_text(token_id),
                    }
                    for token_id, logprob, rank in tokens
                }
            )
        return found[: len(plan.prompt_token_ids)]

    def says_something(self, update: Update) -> bool:
        """Tell whether a chunk is due."""
        about_tokens = update.token_ids and (update.logprobs or self.envelope.return_token_ids)
        return bool(update.text or about_tokens or update.finish_reason or update.prompt_logprobs)


@dataclass(slots=True)
class _LegacyLogprobs:
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def json(self) -> JsonObject:
        return {
            "text_offset": self.text_offset,
            "token_logprobs": self.token_logprobs,
            "tokens": self.tokens,
            "top_logprobs": self.top_logprobs,
        }


class CompletionFormat(Format):
    """`/v1/completions`. `echoes` holds the prompt's text per choice when it is to be echoed."""

    def __init__(
        self,
        envelope: Envelope,
        plans: Sequence[ChoicePlan],
        tokenizer: Tokenizer,
        echoes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(envelope, plans, tokenizer)
        self._echoes = echoes
        self._started: set[int] = set()
        self._offsets = [0] * len(plans)

    def first_chunks(self) -> list[JsonObject]:
        """Nothing: the first tokens bring the first chunk."""
        return []

    def chunk(self, update: Update) -> JsonObject | None:
        """Return the chunk for an update; a choice's first also has the echo and the prompt's token ids."""
        is_first = update.index not in self._started
        if not self.says_something(update) and not (is_first and self._echoes):
            return None
        choice = self._choice(update)
        return self.envelope.wrap("text_completion", [choice], None, chunk=True)

    def usage_chunk(self, usage: JsonObject) -> JsonObject:
        """Return the chunk without choices."""
        return self.envelope.wrap("text_completion", [], usage, chunk=True)

    def whole(self, updates: Sequence[Update], usage: JsonObject) -> JsonObject:
        """Return the whole body."""
        choices = [self._choice(update) for update in updates]
        return self.envelope.wrap("text_completion", choices, usage, chunk=False)

    def _choice(self, update: Update) -> JsonObject:
        is_first = update.index not in self._started
        self._started.add(update.index)
        echo = self._echoes[update.index] if self._echoes and is_first else ""
        choice: JsonObject = {
            "index": update.index,
            "text": echo + update.text,
            "logprobs": self._logprobs(update, with_prompt=is_first and self._echoes is not None),
            "finish_reason": update.finish_reason or None,
            "stop_reason": update.stop_reason,
        }
        if self.envelope.return_token_ids:
            prompt = self.plans[update.index].prompt_token_ids
            choice["prompt_token_ids"] = list(prompt) if is_first else None
            choice["token_ids"] = list(update.token_ids)
        if self.envelope.prompt_logprobs:
            choice["prompt_logprobs"] = self.prompt_logprobs(self.plans[update.index], update)
        return choice

    def _logprobs(self, update: Update, *, with_prompt: bool) -> JsonObject | None:
        plan = self.plans[update.index]
        if plan.sampling.logprobs < 0:
            return None
        legacy = _LegacyLogprobs()
        if with_prompt:
            entries = [None, *update.prompt_logprobs]  # nothing comes before the first token
            for token_id, entry in zip(plan.prompt_token_ids, entries, strict=False):
                self._add(legacy, update.index, token_id, entry)
        for token_id, entry in zip(update.token_ids, update.logprobs, strict=False):
            self._add(legacy, update.index, token_id, entry)
        return legacy.json()

    def _add(self, legacy: _LegacyLogprobs, index: int, token_id: int, entry: TokenLogprob | None) -> None:
        token = self.tokenizer.token_text(token_id)
        legacy.tokens.append(token)
        legacy.token_logprobs.append(None if entry is None else _finite(entry.logprob))
        legacy.top_logprobs.append(None if entry is None else self._top(token, entry))
        legacy.text_offset.append(self._offsets[index])
        self._offsets[index] += len(token)

    def _top(self, token: str, entry: TokenLogprob) -> dict[str, float]:
        """Likeliest first; of tokens that look alike the likelier one stays; the token itself is always
        in."""
        top: dict[str, float] = {}
        for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True):
            top.setdefault(self.tokenizer.token_text(token_id), _finite(logprob))
        top.setdefault(token, _finite(entry.logprob))
        return top


class ChatFormat(Format):
    """`/v1/chat/completions`. `reading` says how the text is read: what is reasoning, and what calls a tool."""

    def __init__(
        self,
        envelope: Envelope,
        plans: Sequence[ChoicePlan],
        tokenizer: Tokenizer,
        reading: Reading | None = None,
    ) -> None:
        super().__init__(envelope, plans, tokenizer)
        self._messages = [ChatText(reading.parser() if reading else None) for _ in plans]

    def first_chunks(self) -> list[JsonObject]:
        """Return one chunk per choice that says who speaks."""
        chunks = []
        for plan in self.plans:
            choice = self._chunk_choice(Update(plan.index), {"role": "assistant", "content": ""})
            chunks.append(self.envelope.wrap("chat.completion.chunk", [choice], None, chunk=True))
        if self.envelope.return_token_ids:
            chunks[0]["prompt_token_ids"] = list(self.plans[0].prompt_token_ids)
        return chunks

    def chunk(self, update: Update) -> JsonObject | None:
        """Return the chunk for an update."""
        parts = self._messages[update.index].read(update)
        delta = delta_of(parts, include_reasoning=self.envelope.include_reasoning)
        if not delta and not self.says_something(replace(update, text="")):
            return None
        choice = self._chunk_choice(update, delta)
        return self.envelope.wrap("chat.completion.chunk", [choice], None, chunk=True)

    def usage_chunk(self, usage: JsonObject) -> JsonObject:
        """Return the chunk without choices."""
        return self.envelope.wrap("chat.completion.chunk", [], usage, chunk=True)

    def whole(self, updates: Sequence[Update], usage: JsonObject) -> JsonObject:
        """Return the whole body."""
        choices = []
        for update in updates:
            parts = self._messages[update.index].read(update)
            message = message_of(parts, include_reasoning=self.envelope.include_reasoning)
            choices.append(self._with_ids({**self._choice(update), "message": message}, update))
        body = self.envelope.wrap("chat.completion", choices, usage, chunk=False)
        if self.envelope.return_token_ids:
            body["prompt_token_ids"] = list(self.plans[0].prompt_token_ids)
        if self.envelope.prompt_logprobs:
            body["prompt_logprobs"] = self.prompt_logprobs(self.plans[0], updates[0])
        return body

    def _chunk_choice(self, update: Update, delta: JsonObject) -> JsonObject:
        return self._with_ids({**self._choice(update), "delta": delta}, update)

    def _choice(self, update: Update) -> JsonObject:
        return {
            "index": update.index,
            "logprobs": self._logprobs(update),
            "finish_reason": self._messages[update.index].finish_reason(update) or None,
            "stop_reason": update.stop_reason,
        }

    def _with_ids(self, choice: JsonObject, update: Update) -> JsonObject:
        if self.envelope.return_token_ids:
            choice["token_ids"] = list(update.token_ids)
        return choice

    def _logprobs(self, update: Update) -> JsonObject | None:
        if not update.logprobs:
            return None
        content = []
        for token_id, entry in zip(update.token_ids, update.logprobs, strict=False):
            top = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            likeliest = [self._token(top_id, logprob) for top_id, logprob in top]
            content.append({**self._token(token_id, entry.logprob), "top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> JsonObject:
        data = self.tokenizer.token_bytes(token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": _finite(logprob),
            "bytes": list(data),
        }


def _finite(logprob: float) -> float:
    return max(logprob, _LOGPROB_MIN)
