"""The common part of tool-call parsers: text, calls among it, and what is malformed.

    content ──marker──▶ section ──marker──▶ header ──▶ body (the family's) ──▶ behind the call
       ▲                                                                          │
       └──────────── anything else: text again ◀──────────────────────────────────┘

A call counts from its first argument on: until then, text that turns out to be no call goes to the content as
it is. Behind that point a mistake leaves the call with the arguments that it has, unfinished, so that nobody
takes them for whole, and the rest is content. Blank space before and between calls is left out.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

from gateway.parsers.json_text import JsonText
from gateway.parsers.machine import Machine, num_held
from gateway.parsers.parts import Content, ToolArguments, ToolStart

_HEADER_CHARS_MAX = 512
_NAME = re.compile(r"[\w.\-]{1,128}")

State = Callable[[], bool]


class ToolParser(Machine):
    """Subclasses say how a call looks.

    Attributes:
        section, section_end: markers around all calls; "" = each call stands alone.
        call: marker before a call's header.
        call_ends: markers of which one is due behind a call's body.
        header_end: the character before which a header ends.
    """

    section = ""
    section_end = ""
    call = ""
    call_ends: Sequence[str] = ()
    header_end = ""

    def __init__(self) -> None:
        super().__init__(self._content)
        self._num_calls = 0  # that have begun
        self._pending = ToolStart(0, "")  # of the header at hand
        self._raw = ""  # taken, and neither content nor part of a call yet
        self._json = JsonText()

    @classmethod
    def markers(cls) -> tuple[str, ...]:
        """Return texts of which a tokenizer may make special tokens."""
        return tuple(filter(None, (cls.section, cls.section_end, cls.call, *cls.call_ends)))

    @abstractmethod
    def _read_header(self, header: str) -> tuple[str, str] | None:
        """Return the name and the id ("" = none) that a header gives, None when it is malformed."""

    @abstractmethod
    def _body(self) -> bool:
        """The state behind the header."""

    # ------------------------------------------------------------------ states

    def _content(self) -> bool:
        marker = self.section or self.call
        place = self._buffer.find(marker)
        if place >= 0:
            text = self._take(place)
            self._out.append(Content(text.rstrip()))
            self._raw = text[len(text.rstrip()) :] + self._take(len(marker))
            self._state = self._in_section if self.section else self._header
            return True
        ready = self._buffer
        if not self._is_final:
            ready = ready[: len(ready) - num_held(ready, marker)].rstrip()
        self._out.append(Content(self._take(len(ready))))
        return False

    def _in_section(self) -> bool:
        return self._expect({self.call: self._header}, otherwise=self._malformed)

    def _header(self) -> bool:
        place = self._buffer[: _HEADER_CHARS_MAX + 1].find(self.header_end)
        if place < 0:
            is_too_long = len(self._buffer) > _HEADER_CHARS_MAX
            return self._malformed() if is_too_long or self._is_final else False
        header = self._take_raw(place)
        named = self._read_header(header)
        if named is None or not _NAME.fullmatch(named[0]):
            return self._malformed()
        self._pending = ToolStart(self._num_calls, *named)
        self._json = JsonText()
        self._state = self._body
        return True

    def _json_body(self) -> bool:
        """The body of families whose arguments are JSON text; its first character makes it a call."""
        if self._buffer and self._pending.index == self._num_calls:
            self._begin_call()
        text, is_valid = self._take_json()
        self._arguments(text)
        if not is_valid:
            return self._malformed()
        if self._json.is_complete:
            self._state = self._behind_body
            return True
        return self._malformed() if self._is_final else False

    def _behind_body(self) -> bool:
        has_ended = self._expect(
            dict.fromkeys(self.call_ends, self._behind_call), otherwise=self._behind_calls
        )
        self._raw = ""
        return has_ended

    def _behind_call(self) -> bool:
        ways = {self.call: self._header}
        if self.section_end:
            ways[self.section_end] = self._behind_calls
        return self._expect(ways, otherwise=self._behind_calls)

    def _behind_calls(self) -> bool:
        """Blank space behind calls is nothing, unless text follows."""
        self._raw = ""
        if self._buffer.strip():
            self._state = self._content
            return True
        if self._is_final:
            self._buffer = ""
        return False

    def _malformed(self) -> bool:
        """What was taken and is no part of a call is content, and so is what follows."""
        self._out.append(Content(self._raw))
        self._raw = ""
        self._state = self._content
        return True

    # ------------------------------------------------------------------ helpers

    def _expect(self, ways: Mapping[str, State], otherwise: State) -> bool:
        """Go the way of the marker that comes next, behind blank space; `otherwise` when none does."""
        num_spaces = len(self._buffer) - len(self._buffer.lstrip())
        rest = self._buffer[num_spaces:]
        for marker, way in ways.items():
            if rest.startswith(marker):
                self._take_raw(num_spaces + len(marker))
                self._state = way
                return True
        if any(marker.startswith(rest) for marker in ways) and not self._is_final:
            return False
        self._state = otherwise
        return True

    def _take_raw(self, length: int) -> str:
        text = self._take(length)
        self._raw += text
        return text

    def _take_json(self) -> tuple[str, bool]:
        """Take what belongs to the JSON value at hand; False = the next character cannot."""
        for place, char in enumerate(self._buffer):
            if self._json.is_complete:
                return self._take(place), True
            if not self._json.take(char):
                return self._take(place), False
        return self._take(len(self._buffer)), True

    def _begin_call(self) -> None:
        self._out.append(self._pending)
        self._num_calls += 1
        self._raw = ""

    def _arguments(self, text: str) -> None:
        self._out.append(ToolArguments(self._num_calls - 1, text))
        self._raw = ""
