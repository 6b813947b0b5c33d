"""Is this text, so far, the beginning of one JSON value? RFC 8259, one character at a time."""

from __future__ import annotations

import re

_DEPTH_MAX = 100
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_BEGUN = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?((?<=[0-9])[eE]([+-]?[0-9]*)?)?)?")
_LITERALS = ("true", "false", "null")
_ESCAPES = frozenset('"\\/bfnrtu')
_HEX = frozenset("0123456789abcdefABCDEF")
_SPACE = frozenset(" \t\n\r")


class JsonText:
    """Feed it characters. Values that need no closing character (numbers) cannot be the outermost."""

    def __init__(self) -> None:
        self._closers: list[str] = []  # "}" or "]" of every open container
        self._expects = "value"  # or "first key", "key", "colon", "comma", "first value"
        self._word = ""  # a number or literal that has begun
        self._is_string = False
        self._escape = -1  # -1 none; 0 behind a backslash; 1..4 hexadecimal digits that are due
        self.is_complete = False

    def take(self, char: str) -> bool:
        """Take one character; False = no JSON value goes on like this."""
        if self.is_complete:
            return False
        if self._is_string:
            return self._take_in_string(char)
        if self._word:
            longer = self._word + char
            if _NUMBER_BEGUN.fullmatch(longer) or any(word.startswith(longer) for word in _LITERALS):
                self._word = longer
                return True
            if not (_NUMBER.fullmatch(self._word) or self._word in _LITERALS):
                return False
            self._word = ""
            self._ends_value()
        return char in _SPACE or self._take_token(char)

    def _take_token(self, char: str) -> bool:
        if char in "{[":
            return self._opens(char)
        if char in "}]":
            return self._closes(char)
        if char == ",":
            return self._moves("comma", "key" if self._closers[-1:] == ["}"] else "value")
        if char == ":":
            return self._moves("colon", "value")
        if char == '"':
            self._is_string = self._expects not in ("comma", "colon")
            return self._is_string
        is_begun = _NUMBER_BEGUN.fullmatch(char) or any(word.startswith(char) for word in _LITERALS)
        if not is_begun or self._expects not in ("value", "first value") or not self._closers:
            return False
        self._word = char
        return True

    def _moves(self, expected: str, then: str) -> bool:
        if self._expects != expected:
            return False
        self._expects = then
        return True

    def _opens(self, char: str) -> bool:
        if self._expects not in ("value", "first value") or len(self._closers) >= _DEPTH_MAX:
            return False
        self._closers.append("}" if char == "{" else "]")
        self._expects = "first key" if char == "{" else "first value"
        return True

    def _closes(self, char: str) -> bool:
        is_due = self._expects in ("comma", "first key" if char == "}" else "first value")
        if self._closers[-1:] != [char] or not is_due:
            return False
        self._closers.pop()
        self._ends_value()
        return True

    def _ends_value(self) -> None:
        self._expects = "comma"
        self.is_complete = not self._closers

    def _take_in_string(self, char: str) -> bool:
        if self._escape == 0:
            self._escape = 4 if char == "u" else -1
            return char in _ESCAPES
        if self._escape > 0:
            self._escape = self._escape - 1 or -1
            return char in _HEX
        if char == "\\":
            self._escape = 0
        elif char == '"':
            self._is_string = False
            if self._expects in ("key", "first key"):
                self._expects = "colon"
            else:
                self._ends_value()
        return char >= " "
