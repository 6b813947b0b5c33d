"""One choice of a chat: its text becomes content, reasoning and calls, as OpenAI's JSON has them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from gateway.choices import Update
from gateway.parsers.parts import Content, Parser, Part, Reasoning, ToolStart, joined
from gateway.schemas import JsonObject


class ChatText:
    """The parser of one choice; None = all text is content."""

    def __init__(self, parser: Parser | None) -> None:
        self._parser = parser
        self._has_called = False

    def read(self, update: Update) -> list[Part]:
        """Return the parts that an update makes certain."""
        if self._parser is None:
            return joined([Content(update.text)])
        parts = self._parser.push(update.text)
        if update.finish_reason:
            parts = joined([*parts, *self._parser.finish()])
        self._has_called = self._has_called or any(isinstance(part, ToolStart) for part in parts)
        return parts

    def finish_reason(self, update: Update) -> str:
        """Return the reason as a chat has it: a text that ended by itself with a call asks for its answer."""
        return "tool_calls" if update.finish_reason == "stop" and self._has_called else update.finish_reason


def delta_of(parts: Sequence[Part], *, include_reasoning: bool) -> JsonObject:
    """Return a stream's `delta`: what is new of each kind. Empty when nothing is."""
    delta: JsonObject = {}
    content = "".join(part.text for part in parts if isinstance(part, Content))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = [_call_delta(part) for part in parts if not isinstance(part, Content | Reasoning)]
    if content:
        delta["content"] = content
    if reasoning and include_reasoning:
        delta |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if calls:
        delta["tool_calls"] = calls
    return delta


def _call_delta(part: Part) -> JsonObject:
    if isinstance(part, ToolStart):
        function: JsonObject = {"name": part.name, "arguments": ""}
        return {"index": part.index, "id": _call_id(part), "type": "function", "function": function}
    assert not isinstance(part, Content | Reasoning)
    return {"index": part.index, "function": {"arguments": part.text}}


def message_of(parts: Sequence[Part], *, include_reasoning: bool) -> JsonObject:
    """Return the whole `message` of an answer that is not streamed."""
    content = "".join(part.text for part in parts if isinstance(part, Content))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    starts = [part for part in parts if isinstance(part, ToolStart)]
    message: JsonObject = {
        "role": "assistant",
        "content": content if content or not starts else None,
        "refusal": None,
    }
    if reasoning and include_reasoning:
        message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if starts:
        message["tool_calls"] = [_call(start, parts) for start in starts]
    return message


def _call(start: ToolStart, parts: Sequence[Part]) -> JsonObject:
    pieces = [
        part.text
        for part in parts
        if not isinstance(part, Content | Reasoning | ToolStart) and part.index == start.index
    ]
    function = {"name": start.name, "arguments": "".join(pieces)}
    return {"id": _call_id(start), "type": "function", "function": function}


def _call_id(start: ToolStart) -> str:
    return start.call_id or f"call_{uuid.uuid4().hex[:24]}"
