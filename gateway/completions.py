"""`/v1/completions` and `/v1/chat/completions`: the way of one HTTP request.

1. the body is read within its bound, decoded, and refused if it asks for what cannot be done; 2. prompts
become token ids; every choice of every prompt becomes a plan with a seed of its own; 3. the generation
submits all choices and waits until DP groups have accepted them, so that a full queue is still
   an HTTP status, not an event;
4. updates become chunks, or are gathered into one body. The connection is watched all the while: when the
client
   leaves, every choice is aborted at once.
"""

from __future__ import annotations

import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from bus.config import GatewayConfig
from bus.control.messages import PodMap
from gateway import parameters, prompts, schemas, structured, tools
from gateway.checkpoint import Checkpoint
from gateway.choices import ChoicePlan, Update
from gateway.core import JobExecutor
from gateway.errors import ApiError, invalid
from gateway.formats import ChatFormat, CompletionFormat, Envelope, Format
from gateway.generation import Executor, Generation
from gateway.metrics import Metrics
from gateway.schemas import ChatBody, CompletionBody, JsonObject
from gateway.transport import EventStream, Json, read_body, unless_client_leaves

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Api:
    """What the endpoints work with."""

    config: GatewayConfig
    checkpoint: Checkpoint
    executor: Executor
    core: JobExecutor  # to look at, for metrics
    metrics: Metrics
    pod_map: Callable[[], PodMap]
    fresh_status: Callable[[], Awaitable[PodMap]]  # with counters as of now, if the manager answers
    is_stopping: Callable[[], bool] = lambda: False

    def check_model(self, model: str | None) -> None:
        """Refuse a model that is not served.

        Raises:
            ApiError: 404.
        """
        if model is not None and model != self.checkpoint.name:
            text = f"the model {model!r} does not exist; {self.checkpoint.name!r} is served"
            raise ApiError(404, "model_not_found", text, param="model")

    def check_running(self) -> None:
        """Refuse new work while stopping.

        Raises:
            ApiError: 503.
        """
        if self.is_stopping():
            raise ApiError(503, "stopping", "the gateway is stopping", retry_after_s=1)


async def create_completion(request: Request) -> Response:
    """`POST /v1/completions`."""
    api: Api = request.app.state.api
    body = schemas.decode(await read_body(request, api.config.body_bytes_max), CompletionBody)
    _check(api, body)
    found = await prompts.completion_prompts(body, api.checkpoint)
    response_id = _response_id("cmpl", body.request_id)
    plans = _plans(api, body, found, response_id, await _grammar(api, body))
    echoes = [found[plan.prompt_index].text for plan in plans] if body.echo else None
    envelope = _envelope(api, body, response_id)
    return await _respond(
        request, api, plans, CompletionFormat(envelope, plans, api.checkpoint.tokenizer, echoes), body
    )


async def create_chat_completion(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    api: Api = request.app.state.api
    body = schemas.decode(await read_body(request, api.config.body_bytes_max), ChatBody)
    _check(api, body)
    prompt = await prompts.chat_prompt(
        body.messages,
        api.checkpoint,
        add_generation_prompt=body.add_generation_prompt is not False,
        template_kwargs=body.chat_template_kwargs,
        tools=tools.offered(body),
    )
    response_id = _response_id("chatcmpl", body.request_id)
    reading, demands = tools.reading(body, api.checkpoint, prompt.text)
    plans = _plans(api, body, [prompt], response_id, await _grammar(api, body, *demands), reading)
    envelope = _envelope(api, body, response_id)
    form = ChatFormat(envelope, plans, api.checkpoint.tokenizer, reading)
    return await _respond(request, api, plans, form, body)


def _check(api: Api, body: CompletionBody | ChatBody) -> None:
    api.check_running()
    api.check_model(body.model)
    parameters.check_neutral(body)


def _envelope(api: Api, body: CompletionBody | ChatBody, response_id: str) -> Envelope:
    return Envelope(
        response_id=response_id,
        created_s=int(time.time()),
        model=api.checkpoint.name,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        return_token_ids=bool(body.return_token_ids),
        prompt_logprobs=body.prompt_logprobs is not None,
        include_reasoning=not isinstance(body, ChatBody) or body.include_reasoning is not False,
    )


def _response_id(prefix: str, request_id: str | None) -> str:
    if request_id is None:
        return f"{prefix}-{uuid.uuid4().hex}"
    if not _REQUEST_ID.fullmatch(request_id):
        raise invalid("request_id", request_id, f"must match {_REQUEST_ID.pattern}")
    return f"{prefix}-{request_id}"


async def _grammar(api: Api, body: CompletionBody | ChatBody, *demands: structured.Request) -> str:
    grammar = await structured.grammar_of(body, *demands)
    if grammar and not api.checkpoint.eos_token_ids:
        text = "the model has no end token, so structured output would never end"
        raise ApiError(400, "unsupported_value", text, param="response_format")
    return grammar


def _plans(
    api: Api,
    body: CompletionBody | ChatBody,
    found: Sequence[prompts.Prompt],
    response_id: str,
    grammar: str,
    reading: tools.Reading | None = None,
) -> list[ChoicePlan]:
    """One plan per prompt and choice. A client may repeat its ids, schedulers must never see one twice."""
    n = parameters.num_choices(body)
    seed = parameters.base_seed(body.seed, secrets.randbits(63))
    options = parameters.text_options(body, reading.shown_tokens if reading else ())
    grammar_after = reading.grammar_after_token_id if reading and grammar else -1
    unique = f"{response_id}-{secrets.token_hex(4)}" if body.request_id else response_id
    plans: list[ChoicePlan] = []
    for prompt_index, prompt in enumerate(found):
        limit = parameters.max_tokens(body, len(prompt.token_ids), api.checkpoint.window_tokens)
        for choice in range(n):
            sampling = parameters.sampling_params(
                body,
                max_tokens=limit,
                seed=parameters.choice_seed(seed, choice),
                eos_token_ids=api.checkpoint.eos_token_ids,
                vocab_size=api.checkpoint.vocab_size,
                grammar=grammar,
                grammar_after_token_id=grammar_after,
            )
            index = len(plans)
            request_id = f"{unique}-{index}" if n * len(found) > 1 else unique
            plans.append(ChoicePlan(index, prompt_index, request_id, prompt.token_ids, sampling, options))
    return plans


async def _respond(
    request: Request, api: Api, plans: list[ChoicePlan], form: Format, body: CompletionBody | ChatBody
) -> Response:
    generation = Generation(
        plans,
        executor=api.executor,
        tokenizer=api.checkpoint.tokenizer,
        metrics=api.metrics,
        backlog_tokens_max=api.config.backlog_tokens_max,
    )
    if not body.stream:
        try:
            whole = await unless_client_leaves(request.receive, _whole(generation, form))
        finally:
            generation.close()
        return Json(whole)
    try:
        await unless_client_leaves(request.receive, generation.start())
    except BaseException:
        generation.close()
        raise
    return EventStream(_chunks(generation, form), generation.close)


async def _chunks(generation: Generation, form: Format) -> AsyncIterator[JsonObject]:
    for chunk in form.first_chunks():
        yield chunk
    async for updates in generation.updates():
        for update in updates:
            next_chunk = form.chunk(update)
            if next_chunk is not None:
                yield next_chunk
    if form.envelope.include_usage:
        yield form.usage_chunk(generation.usage())


async def _whole(generation: Generation, form: Format) -> JsonObject:
    await generation.start()
    gathered = [Update(index) for index in range(len(generation.choices))]
    async for updates in generation.updates():
        for update in updates:
            gathered[update.index] = gathered[update.index].followed_by(update)
    return form.whole(gathered, generation.usage())
