"""What parsers make of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A call of a tool begins; its arguments follow. `call_id` "" = the model gave none."""

    index: int  # of the calls of one choice, from 0
    name: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Part = Content | Reasoning | ToolStart | ToolArguments


class Parser(Protocol):
    """Text in pieces to parts."""

    def push(self, text: str) -> list[Part]:
        """Take the next piece; return what has become certain."""
        ...

    def finish(self) -> list[Part]:
        """Return the rest, as no more text comes."""
        ...


def joined(parts: Iterable[Part]) -> list[Part]:
    """Return the parts with neighbours of one kind made one, and without empty ones."""
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, ToolStart):
            out.append(part)
        elif not part.text:
            continue
        elif type(last) is type(part) and not isinstance(last, ToolStart) and _same_call(last, part):
            out[-1] = replace(last, text=last.text + part.text)
        else:
            out.append(part)
    return out


def _same_call(last: Part | None, part: Part) -> bool:
    if isinstance(last, ToolArguments) and isinstance(part, ToolArguments):
        return last.index == part.index
    return True


def parse_whole(parser: Parser, pieces: Sequence[str]) -> list[Part]:
    """Return all parts of a text, joined."""
    found = [part for piece in pieces for part in parser.push(piece)]
    return joined([*found, *parser.finish()])
