"""`tools` and `tool_choice` of a chat: what may be called, what must be, and how the answer is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gateway.checkpoint import Checkpoint
from gateway.errors import ApiError, invalid
from gateway.parsers import families
from gateway.parsers.forced import NamedParser, RequiredParser, required_schema
from gateway.parsers.parts import Parser
from gateway.parsers.reasoning import CLOSE, OPEN, ReasoningParser, is_closed
from gateway.schemas import ChatBody, JsonObject, NamedTool, ToolSpec
from gateway.structured import Request

_TOOLS_MAX = 128
_NAME = re.compile(r"[\w.\-]{1,128}")


@dataclass(frozen=True, slots=True)
class Reading:
    """How one chat's output is read."""

    checkpoint: Checkpoint
    prompt: str = ""
    tools: Mapping[str, JsonObject] = field(default_factory=dict)  # name -> parameters; empty = no calls
    choice: Literal["auto", "required", "named"] = "auto"

    @property
    def shown_tokens(self) -> tuple[str, ...]:
        """Special tokens that the parsers look for."""
        shown: tuple[str, ...] = (OPEN, CLOSE) if self.checkpoint.has_reasoning else ()
        if self.tools and self.choice == "auto":
            shown += families.TOOL_PARSERS[self.checkpoint.tool_parser].markers()
        return shown

    @property
    def grammar_after_token_id(self) -> int:
        """Behind which token a grammar begins: the end of the thoughts, -1 = at once."""
        if not self.checkpoint.has_reasoning or is_closed(self.prompt):
            return -1
        token_id = self.checkpoint.tokenizer.token_id(CLOSE)
        return -1 if token_id is None else token_id

    def parser(self) -> families.OutputParser | None:
        """Return a fresh parser for one choice, None when its text is content."""
        reasoning = ReasoningParser(self.prompt) if self.checkpoint.has_reasoning else None
        calls = self._call_parser() if self.tools else None
        return families.OutputParser(reasoning, calls) if reasoning or calls else None

    def _call_parser(self) -> Parser:
        if self.choice == "named":
            (name,) = self.tools
            return NamedParser(name)
        if self.choice == "required":
            return RequiredParser()
        return families.create_tool_parser(self.checkpoint.tool_parser, self.tools)


def offered(body: ChatBody) -> list[ToolSpec]:
    """Return the tools that the model is told of; none with `tool_choice` "none".

    Raises:
        ApiError: 400; a tool without a proper name, two of one name, or too many.
    """
    tools = body.tools or []
    if len(tools) > _TOOLS_MAX:
        raise invalid("tools", f"{len(tools)} tools", f"must be at most {_TOOLS_MAX}")
    names = [tool.function.name for tool in tools]
    for place, name in enumerate(names):
        if not _NAME.fullmatch(name):
            raise invalid(f"tools[{place}].function.name", name, f"must match {_NAME.pattern}")
        if name in names[:place]:
            raise invalid(f"tools[{place}].function.name", name, "is there twice")
    if not tools and body.tool_choice not in (None, "none", "auto"):
        raise invalid("tool_choice", body.tool_choice, "needs tools", code="contradictory_fields")
    return [] if body.tool_choice == "none" else tools


def reading(body: ChatBody, checkpoint: Checkpoint, prompt: str) -> tuple[Reading, list[Request]]:
    """Return how the output is read, and what `tool_choice` demands of it.

    Raises:
        ApiError: 400; a function that is not among the tools, or a model whose calls cannot be read.
    """
    tools = {tool.function.name: tool.function.parameters or {} for tool in offered(body)}
    choice = body.tool_choice
    if not tools:
        return Reading(checkpoint, prompt), []
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in tools:
            raise invalid("tool_choice", name, f"must be one of {', '.join(tools)}")
        demand = Request("tool_choice", "json", tools[name] or {"type": "object"})
        return Reading(checkpoint, prompt, {name: tools[name]}, "named"), [demand]
    if choice == "required":
        schema = required_schema(tools, parallel=body.parallel_tool_calls is not False)
        return Reading(checkpoint, prompt, tools, "required"), [Request("tool_choice", "json", schema)]
    if not checkpoint.tool_parser:
        text = (
            'tools: this model defines no tool calls; send tool_choice "required" or a function, or set '
            "gateway.tool_parser"
        )
        raise ApiError(400, "unsupported_value", text, param="tools")
    return Reading(checkpoint, prompt, tools), []
