"""From a body's fields to what is asked of a scheduler and of the text layer. Every range is checked here."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from bus.control.messages import SamplingParams
from gateway.errors import ApiError, invalid
from gateway.schemas import ChatBody, CompletionBody, SamplingBody

COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's
_CHOICES_MAX = 128
_STOP_STRINGS_MAX = 16
_STOP_CHARS_MAX = 1024
_STOP_TOKEN_IDS_MAX = 256
_TOP_LOGPROBS_MAX = 20
_SEED_BITS = 63
_BIASES_MAX = 1024

_TOKEN_ID = re.compile(r"[0-9]{1,9}")

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "priority": (0,),
    "cache_salt": (),
    "kv_transfer_params": ({},),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
}
_NEUTRAL_COMPLETION: dict[str, tuple[object, ...]] = {"suffix": ("",)}
_NEUTRAL_CHAT: dict[str, tuple[object, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "echo": (False,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "add_special_tokens": (False,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How the tokens of a choice become text."""

    stop_strings: tuple[str, ...] = ()
    min_tokens: int = 0  # stop strings are not looked for in these
    skip_special_tokens: bool = True
    include_stop_string: bool = False
    shown_tokens: tuple[str, ...] = ()  # special tokens that are text all the same: a parser's markers


def check_neutral(body: SamplingBody) -> None:
    """Refuse a value that asks for something this gateway cannot do.

    Raises:
        ApiError: 400, naming the field.
    """
    table = _NEUTRAL | (_NEUTRAL_CHAT if isinstance(body, ChatBody) else _NEUTRAL_COMPLETION)
    for name, neutral in table.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            allowed = " or ".join(repr(one) for one in neutral) or "null"
            rule = f"is not supported yet; leave it out or send {allowed}"
            raise invalid(name, value, rule, code="unsupported_value")
    options = body.stream_options
    if options is not None and not body.stream:
        raise invalid("stream_options", msgspec.to_builtins(options), "needs stream = true")
    if options is not None and options.continuous_usage_stats:
        raise invalid(
            "stream_options.continuous_usage_stats", True, "is not supported yet", code="unsupported_value"
        )


def num_choices(body: SamplingBody) -> int:
    """Return `n`, checked."""
    n = _in_range("n", body.n, 1, 1, _CHOICES_MAX)
    best_of = body.best_of if isinstance(body, CompletionBody) else None
    if best_of not in (None, n):
        raise invalid("best_of", best_of, f"must equal n = {n}; more is not supported yet")
    return n


def num_logprobs(body: CompletionBody | ChatBody) -> int:
    """Return how many likeliest tokens to report for each token, -1 when log-probabilities are not wanted."""
    if isinstance(body, CompletionBody):
        return -1 if body.logprobs is None else _in_range("logprobs", body.logprobs, 0, 0, _TOP_LOGPROBS_MAX)
    top = _in_range("top_logprobs", body.top_logprobs, 0, 0, _TOP_LOGPROBS_MAX)
    if top and not body.logprobs:
        raise invalid("top_logprobs", top, "needs logprobs = true")
    return top if body.logprobs else -1


def num_prompt_logprobs(body: CompletionBody | ChatBody) -> int:
    """Return how many likeliest tokens to report for each prompt token, -1 for none: vLLM's `prompt_logprobs`,
    or OpenAI's `echo` with `logprobs`."""
    echoed = num_logprobs(body) if isinstance(body, CompletionBody) and body.echo else -1
    if body.prompt_logprobs is None:
        return echoed
    if body.stream:
        raise invalid("prompt_logprobs", body.prompt_logprobs, "cannot be streamed; leave stream out")
    return max(echoed, _in_range("prompt_logprobs", body.prompt_logprobs, 0, 0, _TOP_LOGPROBS_MAX))


def max_tokens(body: CompletionBody | ChatBody, num_prompt_tokens: int, window_tokens: int) -> int:
    """Return how many tokens to generate at most, after checking that they fit behind the prompt."""
    room = window_tokens - num_prompt_tokens
    name, wanted = "max_tokens", body.max_tokens
    lowest = 1
    if isinstance(body, ChatBody):
        if body.max_completion_tokens is not None:
            if wanted not in (None, body.max_completion_tokens):
                rule = f"contradicts max_completion_tokens = {body.max_completion_tokens}; send one of them"
                raise invalid(name, wanted, rule, code="contradictory_fields")
            name, wanted = "max_completion_tokens", body.max_completion_tokens
        default = room
    else:
        default = min(COMPLETION_TOKENS_DEFAULT, room)
        lowest = 0 if body.echo else 1
    prompt_name = "messages" if isinstance(body, ChatBody) else "prompt"
    if num_prompt_tokens == 0:
        raise ApiError(
            400, "invalid_value", "the prompt has no tokens: must have at least one", param=prompt_name
        )
    if room < lowest:
        raise _beyond_window(prompt_name, num_prompt_tokens, lowest, window_tokens)
    value = _in_range(name, wanted, default, lowest, 1 << 31)
    if value > room:
        raise _beyond_window(prompt_name, num_prompt_tokens, value, window_tokens)
    return value


def _beyond_window(
    param: str, num_prompt_tokens: int, num_output_tokens: int, window_tokens: int
) -> ApiError:
    text = (
        f"This model's maximum context length is {window_tokens} tokens. However, you requested "
        f"{num_prompt_tokens + num_output_tokens} tokens ({num_prompt_tokens} in the prompt, "
        f"{num_output_tokens} in the completion)."
    )
    return ApiError(400, "context_length_exceeded", text, param=param)


def text_options(body: SamplingBody, shown_tokens: tuple[str, ...] = ()) -> TextOptions:
    """Return the text layer's part, checked."""
    return TextOptions(
        stop_strings=_stop_strings(body.stop),
        min_tokens=body.min_tokens or 0,
        skip_special_tokens=body.skip_special_tokens is not False,
        include_stop_string=bool(body.include_stop_str_in_output),
        shown_tokens=shown_tokens,
    )


def sampling_params(
    body: CompletionBody | ChatBody,
    *,
    max_tokens: int,
    seed: int,
    eos_token_ids: tuple[int, ...],
    vocab_size: int,
    grammar: str = "",
    grammar_after_token_id: int = -1,
) -> SamplingParams:
    """Return the scheduler's part, checked.

    Args:
        max_tokens: as `max_tokens()` returned it.
        seed: of this choice, 63 bits.
        eos_token_ids, vocab_size: of the model.
        grammar: as `structured.grammar_of` returned it.
        grammar_after_token_id: where it begins; see `SamplingParams`.

    Raises:
        ApiError: 400, naming field, value and rule.
    """
    logprobs = num_logprobs(body)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_number("temperature", body.temperature, 1.0, lambda t: 0 <= t <= 2, "must be 0..2"),
        top_p=_number("top_p", body.top_p, 1.0, lambda p: 0 < p <= 1, "must be above 0 and at most 1"),
        top_k=max(0, _in_range("top_k", body.top_k, 0, -1, 1 << 31)),
        seed=seed,
        min_tokens=_in_range("min_tokens", body.min_tokens, 0, 0, max_tokens),
        ignore_eos=bool(body.ignore_eos),
        eos_token_ids=eos_token_ids,
        stop_token_ids=_stop_token_ids(body.stop_token_ids, vocab_size),
        logprobs=logprobs,
        prompt_logprobs=num_prompt_logprobs(body),
        min_p=_number("min_p", body.min_p, 0.0, lambda p: 0 <= p <= 1, "must be 0..1"),
        presence_penalty=_penalty("presence_penalty", body.presence_penalty),
        frequency_penalty=_penalty("frequency_penalty", body.frequency_penalty),
        repetition_penalty=_number(
            "repetition_penalty",
            body.repetition_penalty,
            1.0,
            lambda r: 0.01 <= r <= 100,
            "must be 0.01..100",
        ),
        logit_bias=_logit_bias(body.logit_bias, vocab_size),
        grammar=grammar,
        grammar_after_token_id=grammar_after_token_id,
    )


def _penalty(name: str, value: float | None) -> float:
    return _number(name, value, 0.0, lambda p: -2 <= p <= 2, "must be -2..2")


def _logit_bias(biases: dict[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(biases or ()) > _BIASES_MAX:
        raise invalid("logit_bias", f"{len(biases or ())} entries", f"must be at most {_BIASES_MAX}")
    found: dict[int, float] = {}
    for key, bias in (biases or {}).items():
        if not _TOKEN_ID.fullmatch(key) or int(key) >= vocab_size:
            raise invalid("logit_bias", key, f"token ids must be 0..{vocab_size - 1}")
        if not -100 <= bias <= 100:
            raise invalid("logit_bias", {key: bias}, "must be -100..100")
        found[int(key)] = float(bias)
    return tuple(sorted(found.items()))


def base_seed(seed: int | None, drawn: int) -> int:
    """Return the request's seed in 63 bits: the client's, or the one drawn for it."""
    if seed is None:
        return drawn
    if not -(1 << 63) <= seed < 1 << 64:
        raise invalid("seed", seed, "must fit 64 bits")
    return seed & ((1 << _SEED_BITS) - 1)


def choice_seed(seed: int, choice: int) -> int:
    """Return the seed of one of `n` choices. The first has the request's own, as if it were alone."""
    if choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > _STOP_STRINGS_MAX:
        raise invalid("stop", list(strings), f"must be at most {_STOP_STRINGS_MAX} strings")
    for text in strings:
        if not 0 < len(text) <= _STOP_CHARS_MAX:
            raise invalid("stop", text, f"must have 1..{_STOP_CHARS_MAX} characters")
    return tuple(dict.fromkeys(strings))


def _stop_token_ids(token_ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    if len(token_ids or ()) > _STOP_TOKEN_IDS_MAX:
        raise invalid("stop_token_ids", token_ids, f"must be at most {_STOP_TOKEN_IDS_MAX} ids")
    check_token_ids("stop_token_ids", token_ids or [], vocab_size)
    return tuple(dict.fromkeys(token_ids or ()))


def check_token_ids(name: str, token_ids: list[int], vocab_size: int) -> None:
    """Refuse ids that the model does not have.

    Raises:
        ApiError: 400, naming the first.
    """
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise invalid(name, token_id, f"token ids must be 0..{vocab_size - 1}")


def _in_range(name: str, value: int | None, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise invalid(name, value, f"must be {low}..{high}" if high < 1 << 31 else f"must be at least {low}")
    return value


def _number(
    name: str, value: float | None, default: float, holds: Callable[[float], bool], rule: str
) -> float:
    if value is None:
        return default
    if not math.isfinite(value) or not holds(value):
        raise invalid(name, value, rule)
    return float(value)
