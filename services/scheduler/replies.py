"""What a gateway is told."""

from __future__ import annotations

from bus.control.messages import (
    AddRequest,
    RequestAccepted,
    RequestFailed,
    RequestRejected,
    TokenLogprob,
    TokensGenerated,
)
from services.batching.admission import Refusal
from services.batching.request import Finish, Request
from services.scheduler.events import Reply


def accepted(request: Request) -> Reply:
    """The request is queued (or was already)."""
    return Reply(request.gateway, RequestAccepted(request_id=request.request_id, attempt=request.attempt))


def rejected(gateway: str, message: AddRequest, refused: Refusal) -> Reply:
    """The request is not queued."""
    return Reply(
        gateway,
        RequestRejected(
            request_id=message.request_id, attempt=message.attempt, code=refused.code, message=refused.message
        ),
    )


def failed(request: Request, code: str, text: str, *, retryable: bool) -> Reply:
    """The request was accepted and cannot go on."""
    return Reply(
        request.gateway,
        RequestFailed(
            request_id=request.request_id,
            attempt=request.attempt,
            code=code,
            message=text,
            retryable=retryable,
        ),
    )


def generated(
    request: Request,
    token_ids: tuple[int, ...],
    finish: Finish | None,
    *,
    logprob: TokenLogprob | None = None,
    prompt_logprobs: tuple[TokenLogprob, ...] = (),
) -> Reply:
    """Output tokens, the last of `request.token_ids`; `finish` makes it the last word.

    A token that stops the request (eos or stop id) is among `token_ids` and is named in `stop_token_id`:
    whoever makes text leaves it out, whoever counts usage counts it.
    """
    return Reply(
        request.gateway,
        TokensGenerated(
            request_id=request.request_id,
            attempt=request.attempt,
            first_index=request.num_output_tokens - len(token_ids),
            token_ids=token_ids,
            logprobs=(logprob,) if token_ids and logprob is not None else (),
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish.reason if finish else "",
            stop_token_id=finish.stop_token_id if finish else -1,
            num_cached_tokens=max(0, request.num_cached_tokens),
        ),
    )
