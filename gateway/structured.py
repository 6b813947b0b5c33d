"""Structured output: from a body's fields to a grammar in llguidance's text form, checked before it is used.

Spellings: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*` fields. At most one
of them may ask for something. A grammar is compiled here once, against a vocabulary of single bytes, within
the library's own bounds of work and within a bound of time, so that what cannot be compiled is a 400 and never
reaches a scheduler. Workers compile it again against the model's vocabulary (`services.model.grammar`).
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import llguidance
import msgspec

from gateway.errors import ApiError, invalid
from gateway.schemas import JsonObject, ResponseFormat, SamplingBody, StructuredOutputs

GRAMMAR_BYTES_MAX = 65_536
_CHOICES_MAX = 1_000
_COMPILE_TIMEOUT_S = 5.0
# Any white space, but never an endless run of it, which small models fall into.
_WHITESPACE = r"[ \n\r\t]{1,40}"

Kind = Literal["json", "regex", "choice", "grammar"]


class Request(NamedTuple):
    """What the client wants its output to be."""

    param: str  # the field that says so
    kind: Kind
    value: object
    json_options: Mapping[str, object] = {"whitespace_pattern": _WHITESPACE}


async def grammar_of(body: SamplingBody, *more: Request) -> str:
    """Return the grammar that the body asks for, "" when it asks for none. `more`: other reasons for one.

    Raises:
        ApiError: 400, naming the field: two fields ask for something, or it cannot be compiled.
    """
    requests = [*_response_format(body.response_format), *_structured(body), *_guided(body), *more]
    if len(requests) > 1:
        names = " and ".join(request.param for request in requests)
        text = f"{names}: only one of them may constrain the output"
        raise ApiError(400, "contradictory_fields", text, param=requests[1].param)
    return await compiled(requests[0]) if requests else ""


async def compiled(request: Request) -> str:
    """Return the grammar of one request, once it is known to compile.

    Raises:
        ApiError: 400; too large, broken, too complex, or too slow.
    """
    source = _text(request)
    try:
        async with asyncio.timeout(_COMPILE_TIMEOUT_S):
            grammar, fault = await asyncio.to_thread(_compile, request.kind, source, _options(request))
    except TimeoutError:
        grammar, fault = "", f"takes more than {_COMPILE_TIMEOUT_S:g} s to compile"
    if fault:
        raise invalid(request.param, request.value, f"cannot be used: {fault}", code="invalid_grammar")
    return grammar


def _response_format(form: ResponseFormat | None) -> list[Request]:
    if form is None or form.type == "text":
        return []
    if form.type == "json_object":
        return [Request("response_format", "json", {"type": "object"})]
    if form.json_schema is None:
        raise invalid("response_format.json_schema", None, 'is needed with type "json_schema"')
    return [Request("response_format", "json", form.json_schema.schema)]


def _structured(body: SamplingBody) -> list[Request]:
    given = body.structured_outputs
    if given is None:
        return []
    found = _each("structured_outputs.", given)
    if given.json_object:
        found.append(Request("structured_outputs.json_object", "json", {"type": "object"}))
    if given.disable_any_whitespace:
        return [one._replace(json_options={"whitespace_flexible": False}) for one in found]
    if given.whitespace_pattern is not None:
        options = {"whitespace_pattern": given.whitespace_pattern}
        return [one._replace(json_options=options) for one in found]
    return found


def _guided(body: SamplingBody) -> list[Request]:
    older = StructuredOutputs(
        json=body.guided_json,
        regex=body.guided_regex,
        choice=body.guided_choice,
        grammar=body.guided_grammar,
    )
    return _each("guided_", older)


def _each(prefix: str, given: StructuredOutputs) -> list[Request]:
    values: list[tuple[Kind, object]] = [
        ("json", given.json),
        ("regex", given.regex),
        ("choice", given.choice),
        ("grammar", given.grammar),
    ]
    return [Request(prefix + kind, kind, value) for kind, value in values if value is not None]


def _text(request: Request) -> str:
    value = request.value
    if request.kind == "choice":
        choices = value if isinstance(value, list) else []
        if not 0 < len(choices) <= _CHOICES_MAX or not all(choices):
            raise invalid(request.param, value, f"must be 1..{_CHOICES_MAX} texts, none of them empty")
    if value == "":
        raise invalid(request.param, value, "must not be empty")
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if len(text.encode("utf-8", "replace")) > GRAMMAR_BYTES_MAX:
        raise invalid(request.param, value, f"must be at most {GRAMMAR_BYTES_MAX} bytes")
    return text


def _options(request: Request) -> str:
    return msgspec.json.encode(dict(request.json_options)).decode() if request.kind == "json" else ""


@functools.lru_cache(maxsize=64)
def _compile(kind: Kind, text: str, json_options: str) -> tuple[str, str]:
    """Return the grammar and "", or "" and what is wrong."""
    try:
        if kind == "json":
            options: JsonObject = msgspec.json.decode(json_options)
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]
        else:
            grammar = llguidance.grammar_from(kind, text)
    except (ValueError, RecursionError, IndexError) as error:
        return "", _one_line(str(error) or type(error).__name__)
    matcher = llguidance.LLMatcher(_byte_vocabulary(), grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_logit_bias()  # the first step shows what construction puts off
    fault = matcher.get_error()
    return ("", _one_line(fault)) if fault else (grammar, "")


class _Bytes:
    """256 tokens of one byte each, and an end."""

    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]  # noqa: RUF012
    special_token_ids = (256,)
    bos_token_id = None
    eos_token_id = 256

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@functools.cache
def _byte_vocabulary() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))


def _one_line(text: str) -> str:
    return " ".join(text.strip().split("\n", 1)[0].split())[:200]
