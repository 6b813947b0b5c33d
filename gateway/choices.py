"""One choice of a request: its tokens become text, and its stop strings are found. Pure.

The result does not depend on how tokens were grouped on their way: with stop strings, tokens are taken one by
one, and tokens behind the one that completes a stop string do not exist for the client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bus.control.messages import FinishReason, SamplingParams, TokenLogprob
from gateway.parameters import TextOptions
from gateway.text import Detokenizer, StopMatcher, Tokenizer


@dataclass(frozen=True, slots=True)
class Update:
    """What became known of one choice since the last update. `finish_reason` other than "" is the last
    word."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, or empty
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason = ""
    stop_reason: int | str | None = None  # the token or string that stopped it; None: end of text, or length

    def followed_by(self, later: Update) -> Update:
        """Return both as one."""
        return replace(
            later,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=self.prompt_logprobs + later.prompt_logprobs,
        )


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """One choice as it is asked of a scheduler."""

    index: int
    prompt_index: int  # choices of one prompt share it
    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    text_options: TextOptions


class Choice:
    """The state of one choice."""

    def __init__(self, plan: ChoicePlan, tokenizer: Tokenizer) -> None:
        options, sampling = plan.text_options, plan.sampling
        self.plan = plan
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.is_finished = False
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=options.skip_special_tokens, shown=options.shown_tokens
        )
        self._matcher = StopMatcher(options.stop_strings, include=options.include_stop_string)
        eos_token_ids = () if sampling.ignore_eos else sampling.eos_token_ids
        self._eos_token_ids = frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(sampling.stop_token_ids + eos_token_ids)

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: tuple[TokenLogprob, ...] = (),
        prompt_logprobs: tuple[TokenLogprob, ...] = (),
    ) -> Update:
        """Take output tokens; the update finishes the choice if they complete a stop string."""
        text = ""
        num_taken = 0
        step = 1 if self.plan.text_options.stop_strings else max(1, len(token_ids))
        while num_taken < len(token_ids) and self._matcher.matched is None:
            part = token_ids[num_taken : num_taken + step]
            num_taken += len(part)
            text += self._push_part(part)
        stop = self._matcher.matched
        self.is_finished = stop is not None
        return Update(
            index=self.plan.index,
            text=text,
            token_ids=tuple(token_ids[:num_taken]),
            logprobs=logprobs[:num_taken],
            prompt_logprobs=prompt_logprobs,
            finish_reason="stop" if stop is not None else "",
            stop_reason=stop,
        )

    def finish(self, reason: FinishReason, stop_token_id: int) -> Update:
        """Take the scheduler's last word; return what was held back."""
        text = self._matcher.push(self._detokenizer.finish())
        stop: int | str | None = self._matcher.matched
        if stop is None:
            text += self._matcher.finish()
            if reason == "stop" and stop_token_id not in self._eos_token_ids:
                stop = stop_token_id
        self.is_finished = True
        return Update(
            index=self.plan.index,
            text=text,
            finish_reason="stop" if self._matcher.matched is not None else reason,
            stop_reason=stop,
        )

    def _push_part(self, part: Sequence[int]) -> str:
        self.num_output_tokens += len(part)
        past_min_tokens = self.num_output_tokens > self.plan.text_options.min_tokens
        if past_min_tokens and part[-1] in self._stop_token_ids:
            part = part[:-1]  # it ends the text and is no part of it
        text = self._detokenizer.push(part) if part else ""
        return self._matcher.push(text) if past_min_tokens or not self._has_stops else text

    @property
    def _has_stops(self) -> bool:
        return bool(self.plan.text_options.stop_strings)
