"""Chat messages to prompt text, by the checkpoint's own Jinja template, in a sandbox.

The template comes with the checkpoint and the messages from anybody: the environment is sandboxed and
immutable; its output, its time and the size of what it multiplies are bounded; and whatever goes wrong inside
is the client's error, not the server's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bus.clock import NS_PER_MS, now_ns
from bus.errors import ConfigError
from gateway.errors import ApiError, invalid

_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
)
RENDER_MS_MAX = 3_000
_OPERAND_MAX = 1_000_000
_EXPONENT_MAX = 64
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


_DEADLINE_NS: ContextVar[int] = ContextVar("deadline_ns")


class _TickingCode(CodeGenerator):
    """Every block, so also every turn of a loop and every call of a macro, begins with a look at the clock."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)


class _Environment(ImmutableSandboxedEnvironment):
    """Raises `ValueError` when a template takes too long or makes too much."""

    code_generator_class = _TickingCode
    intercepted_binops = frozenset({"*", "**"})

    @staticmethod
    def tick() -> None:
        """Stop a template whose time is up."""
        if now_ns() > _DEADLINE_NS.get():
            raise ValueError("the chat template takes too long")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply within bounds: `"a" * 10 ** 10` is not text, it is an attack."""
        sizes = [
            len(one) if isinstance(one, str | bytes | list | tuple) else abs(one) for one in (left, right)
        ]
        is_number = all(isinstance(one, int | float) for one in (left, right))
        if operator == "**" and (sizes[0] > _OPERAND_MAX or sizes[1] > _EXPONENT_MAX):
            raise ValueError(f"{sizes[0]} ** {sizes[1]} is too large")
        if operator == "*" and not is_number and sizes[0] * sizes[1] > _OPERAND_MAX:
            raise ValueError(f"a repetition of {sizes[0]} * {sizes[1]} is too long")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model wrote, for training; here it only
    renders."""

    tags = {"generation"}  # noqa: RUF012  # the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template with the checkpoint's special tokens.

    Args:
        source: Jinja text.
        special_tokens: e.g. {"bos_token": "<s>"}; visible in the template.
        rendered_chars_max: bound of the prompt's text.
        render_ms_max: bound of the time that one rendering may take.

    Raises:
        ConfigError: the template does not parse.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        rendered_chars_max: int,
        render_ms_max: int = RENDER_MS_MAX,
    ) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"chat template: does not parse: {error}") from None
        self._special_tokens = dict(special_tokens)
        self._rendered_chars_max = rendered_chars_max
        self._render_ms_max = render_ms_max

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt's text.

        Args:
            messages: role, content and whatever else a message has.
            tools: what the model may call, as OpenAI's API has them.
            add_generation_prompt: end with the start of the assistant's turn.
            extra: the client's `chat_template_kwargs`.

        Blocks while it renders; a thread may do it.

        Raises:
            ApiError: 400; the template refuses the messages, takes too long, or its text grows too long.
        """
        taken = (_RESERVED | self._special_tokens.keys()) & (extra or {}).keys()
        if taken:
            raise invalid("chat_template_kwargs", sorted(taken), "is set by the server")
        values: dict[str, object] = {
            **self._special_tokens,
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **(extra or {}),
        }
        try:
            return self._bounded(values)
        except _TEMPLATE_FAULTS as error:
            text = f"the chat template refuses the messages: {error}"
            raise ApiError(400, "chat_template_error", text, param="messages") from None

    def _bounded(self, values: Mapping[str, object]) -> str:
        _DEADLINE_NS.set(now_ns() + self._render_ms_max * NS_PER_MS)
        parts: list[str] = []
        num_chars = 0
        for part in self._template.generate(values):
            num_chars += len(part)
            if num_chars > self._rendered_chars_max:
                raise ValueError(f"more than {self._rendered_chars_max} characters of prompt")
            parts.append(part)
        return "".join(parts)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; models were trained on plain JSON.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
