"""Qwen and Hermes: `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, one after the other."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gateway.parsers.json_text import JsonText
from gateway.parsers.parts import ToolStart
from gateway.parsers.tools import _NAME, ToolParser


class HermesParser(ToolParser):
    """See the module's docstring."""

    call = "<tool_call>"
    call_ends: Sequence[str] = ("</tool_call>",)
    header_end = "{"

    def _read_header(self, header: str) -> tuple[str, str] | None:
        self._name = ""
        self._held = ""  # arguments that came before the name
        return None if header.strip() else ("_", "")

    def _body(self) -> bool:
        return self._expect({"{": self._key}, otherwise=self._malformed)

    def _key(self) -> bool:
        return self._expect({'"': self._rest_of_key}, otherwise=self._malformed)

    def _rest_of_key(self) -> bool:
        place = self._buffer[:129].find('"')
        if place < 0:
            return self._malformed() if self._is_final or len(self._buffer) > 128 else False
        self._field = self._take_raw(place + 1)[:-1]
        self._state = self._colon
        return True

    def _colon(self) -> bool:
        self._json = JsonText()
        self._value = ""
        begins = {"name": '"', "arguments": "{", "parameters": "{"}.get(self._field)
        then = self._value_begins if begins else self._other_value
        return self._expect({":": then}, otherwise=self._malformed)

    def _value_begins(self) -> bool:
        """The value is of the one type that it may have, or the call is malformed."""
        begin = '"' if self._field == "name" else "{"
        is_streamed = bool(self._name) and begin == "{"
        state = self._streamed_value if is_streamed else self._held_value
        text = self._buffer.lstrip()
        if not text:
            return self._malformed() if self._is_final else False
        self._take_raw(len(self._buffer) - len(text))
        if text[0] != begin:
            return self._malformed()
        if is_streamed:
            self._start()
        self._state = state
        return True

    def _other_value(self) -> bool:
        return self._held_value()

    def _streamed_value(self) -> bool:
        text, is_valid = self._take_json()
        self._arguments(text)
        return self._value_ends(is_valid)

    def _held_value(self) -> bool:
        text, is_valid = self._take_json()
        self._raw += text
        self._value += text
        if is_valid and self._json.is_complete:
            if self._field == "name":
                self._name = str(json.loads(self._value))
                is_valid = bool(_NAME.fullmatch(self._name))
            elif self._field in ("arguments", "parameters"):
                self._held = self._value
        return self._value_ends(is_valid)

    def _value_ends(self, is_valid: bool) -> bool:
        if not is_valid:
            return self._malformed()
        if not self._json.is_complete:
            return self._malformed() if self._is_final else False
        self._state = self._behind_value
        return True

    def _behind_value(self) -> bool:
        return self._expect({",": self._key, "}": self._object_ends}, otherwise=self._malformed)

    def _object_ends(self) -> bool:
        if not self._name:
            return self._malformed()
        if self._num_calls == self._pending.index:
            self._start()
            self._arguments(self._held or "{}")
        self._state = self._behind_body
        return True

    def _start(self) -> None:
        self._pending = ToolStart(self._pending.index, self._name)
        self._begin_call()
