"""Calls whose arguments are tagged values: the common part of GLM-4.5 and MiniMax M2.

A value is text. It becomes JSON by the type that the tool declares for it: text stays text where a string is
declared; elsewhere it is taken for JSON if it is some, else for text.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping

from gateway.parsers.tools import ToolParser

Tools = Mapping[str, Mapping[str, object]]  # name -> JSON schema of the parameters

_KEY_CHARS_MAX = 256


class TaggedParser(ToolParser):
    """Subclasses give the tags.

    Attributes:
        key_begin, key_end, value_end: markers of one argument.
        call_end: behind the last.
    """

    key_begin = ""
    key_end = ""
    value_end = ""
    call_end = ""

    def __init__(self, tools: Tools | None = None) -> None:
        super().__init__()
        self._tools = tools or {}
        self._key = ""
        self._num_arguments = 0

    @classmethod
    def markers(cls) -> tuple[str, ...]:
        """Return texts of which a tokenizer may make special tokens."""
        return (*super().markers(), cls.key_begin, cls.key_end, cls.value_end, cls.call_end)

    def _body(self) -> bool:
        self._num_arguments = 0
        return self._expect_argument()

    def _expect_argument(self) -> bool:
        ways = {self.key_begin: self._read_key, self.call_end: self._end_arguments}
        return self._expect(ways, otherwise=self._malformed)

    def _read_key(self) -> bool:
        place = self._buffer[: _KEY_CHARS_MAX + len(self.key_end)].find(self.key_end)
        if place < 0:
            is_too_long = len(self._buffer) >= _KEY_CHARS_MAX + len(self.key_end)
            return self._malformed() if is_too_long or self._is_final else False
        self._key = self._take_raw(place).strip()
        self._take_raw(len(self.key_end))
        self._state = self._behind_key
        return True

    @abstractmethod
    def _behind_key(self) -> bool:
        """The state between key and value; goes on to `_read_value`."""

    def _read_value(self) -> bool:
        place = self._buffer.find(self.value_end)
        if place < 0:
            return self._malformed() if self._is_final else False
        text = self._take(place)
        self._take(len(self.value_end))
        self._begin_if_pending()
        opening = ", " if self._num_arguments else "{"
        self._num_arguments += 1
        self._arguments(f"{opening}{json.dumps(self._key, ensure_ascii=False)}: {self._json_of(text)}")
        self._state = self._expect_argument
        return True

    def _end_arguments(self) -> bool:
        self._begin_if_pending()
        self._arguments("}" if self._num_arguments else "{}")
        self._state = self._behind_call
        return True

    def _begin_if_pending(self) -> None:
        if self._pending.index == self._num_calls:
            self._begin_call()

    def _json_of(self, text: str) -> str:
        value: object = text
        if not self._is_declared_text():
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                value = text
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except ValueError:
            return json.dumps(text, ensure_ascii=False)

    def _is_declared_text(self) -> bool:
        properties = self._tools.get(self._pending.name, {}).get("properties")
        declared = properties.get(self._key) if isinstance(properties, dict) else None
        return isinstance(declared, dict) and declared.get("type") == "string"
