"""A gateway's HTTP application over schedulers that live in the test: no sockets, no processes.

The tokenizer is byte-level without merges, so every byte is one token and a scripted text is its bytes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bus.config import GatewayConfig
from bus.control.messages import (
    AbortRequest,
    AddRequest,
    Member,
    Message,
    PodMap,
    RequestAccepted,
    RequestRejected,
    TokenLogprob,
    TokensGenerated,
)
from gateway import app, text
from gateway.chat_template import ChatTemplate
from gateway.checkpoint import Checkpoint
from gateway.completions import Api
from gateway.core import JobExecutor
from gateway.dispatcher import Dispatcher, Listener
from gateway.events import SchedulerMessage
from gateway.jobs import JobLimits
from gateway.metrics import Metrics

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WINDOW_TOKENS = 200
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "ab", "max_tokens": 50}


def byte_tokenizer(*special: str) -> text.JsonTokenizer:
    """256 byte tokens, then `<|end|>` (256) and further special tokens."""
    alphabet = dict(text._BYTE_OF_CHAR)
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|end|>", *special)])
    return text.JsonTokenizer(tokenizer)


END = 256
TOKENIZER = byte_tokenizer()


def logprob_of(token_id: int) -> TokenLogprob:
    """What a fake scheduler says about a token: itself first, the end token second."""
    return TokenLogprob(
        token_id=token_id, logprob=-0.5, rank=1, top_token_ids=(token_id, END), top_logprobs=(-0.5, -2.0)
    )


@dataclass
class FakeScheduler:
    """Answers every request with `output` (bytes; END stops), `tokens_per_message` at a time."""

    listen: Callable[[SchedulerMessage], None]
    output: bytes = b"hello world"
    tokens_per_message: int = 3
    reject: str = ""
    hold: bool = False  # accept, then say nothing
    reachable: bool = True
    closed: bool = False
    sent: list[Message] = field(default_factory=list)

    def send(self, message: Message) -> bool:
        if self.closed or not self.reachable:
            return False
        self.sent.append(message)
        if isinstance(message, AddRequest):
            asyncio.get_running_loop().call_soon(self._answer, message)
        return True

    def close(self) -> None:
        self.closed = True

    def adds(self) -> list[AddRequest]:
        return [message for message in self.sent if isinstance(message, AddRequest)]

    def aborts(self) -> list[AbortRequest]:
        return [message for message in self.sent if isinstance(message, AbortRequest)]

    def say(self, message: SchedulerMessage) -> None:
        if not self.closed:
            self.listen(message)

    def _answer(self, add: AddRequest) -> None:
        names = {"request_id": add.request_id, "attempt": add.attempt}
        if self.reject:
            self.say(RequestRejected(**names, code=self.reject, message=f"scheduler says {self.reject}"))  # type: ignore[arg-type]
            return
        self.say(RequestAccepted(**names))  # type: ignore[arg-type]
        if not self.hold:
            for place, message in enumerate(self.answers(add)):
                asyncio.get_running_loop().call_later(place * 0.0005, self.say, message)

    def answers(self, add: AddRequest) -> list[TokensGenerated]:
        sampling = add.sampling
        ids = [*self.output, END][: sampling.max_tokens]
        stopped = bool(ids) and ids[-1] == END and not sampling.ignore_eos
        start = len(add.output_token_ids)
        out = []
        for first in range(start, max(len(ids), start + 1), self.tokens_per_message):
            part = ids[first : first + self.tokens_per_message]
            is_last = first + self.tokens_per_message >= len(ids)
            prompt_logprobs = (
                tuple(logprob_of(token_id) for token_id in add.prompt_token_ids[1:])
                if first == 0 and sampling.prompt_logprobs >= 0
                else ()
            )
            out.append(
                TokensGenerated(
                    request_id=add.request_id,
                    attempt=add.attempt,
                    first_index=first,
                    token_ids=tuple(part),
                    logprobs=tuple(logprob_of(one) for one in part) if sampling.logprobs >= 0 else (),
                    prompt_logprobs=prompt_logprobs,
                    finish_reason=("stop" if stopped else "length") if is_last else "",
                    stop_token_id=END if is_last and stopped else -1,
                    num_cached_tokens=2 if first == 0 else 0,
                )
            )
        return out


class GatewayWorld:
    """Everything between an HTTP client and fake schedulers."""

    def __init__(
        self,
        config: GatewayConfig | None = None,
        *,
        template: str | None = TEMPLATE,
        tool_parser: str = "",
        has_reasoning: bool = False,
        tokenizer: text.Tokenizer = TOKENIZER,
    ) -> None:
        self.config = config or GatewayConfig()
        self.schedulers: dict[int, FakeScheduler] = {}
        self.settings: dict[str, object] = {}
        self.core = JobExecutor(JobLimits(retry_window_ms=self.config.retry_window_ms, backoff_ms=1))
        self.dispatcher = Dispatcher(self.core, self._connect)
        self.pod_map = PodMap(pod="test", epoch=0)
        self.is_stopping = False
        self.metrics = Metrics("tiny")
        chat_template = (
            ChatTemplate(template, {"eos_token": "<|end|>"}, rendered_chars_max=10_000) if template else None
        )
        self.checkpoint = Checkpoint(
            "tiny", tokenizer, chat_template, (END,), WINDOW_TOKENS, 260, tool_parser, has_reasoning
        )
        self.app = app.build(
            Api(
                config=self.config,
                checkpoint=self.checkpoint,
                executor=self.dispatcher,
                core=self.core,
                metrics=self.metrics,
                pod_map=lambda: self.pod_map,
                fresh_status=self._status,
                is_stopping=lambda: self.is_stopping,
            )
        )
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    def serve(self, *incarnations: int, **settings: object) -> GatewayWorld:
        """Publish a map with one serving scheduler per incarnation number (0 = dead)."""
        self.settings = settings
        members = tuple(
            Member(
                service="scheduler",
                index=index,
                incarnation=abs(incarnation),
                pid=1,
                state="ready" if incarnation > 0 else "dead",
                endpoint=f"{index}/{incarnation}" if incarnation > 0 else "",
                counters={"num_steps": 5},
            )
            for index, incarnation in enumerate(incarnations)
        )
        serving = tuple(index for index, incarnation in enumerate(incarnations) if incarnation > 0)
        self.pod_map = PodMap(
            pod="test", epoch=self.pod_map.epoch + 1, members=members, serving_dp_groups=serving
        )
        self.dispatcher.take_pod_map(self.pod_map)
        return self

    async def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        """POST JSON."""
        return await self.client.post(path, json=body, headers=headers)

    async def events(self, path: str, body: Mapping[str, object]) -> list[dict]:  # type: ignore[type-arg]
        """POST with `stream` and return the events; asserts that [DONE] ends them."""
        response = await self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return sse_events(response.text)

    def _connect(self, endpoint: str, listen: Listener) -> FakeScheduler:
        scheduler = FakeScheduler(listen, **self.settings)  # type: ignore[arg-type]
        self.schedulers[int(endpoint.split("/")[0])] = scheduler
        return scheduler

    async def _status(self) -> PodMap:
        return self.pod_map


def sse_events(text: str) -> list[dict]:  # type: ignore[type-arg]
    """Return the JSON of every event; the last must be [DONE]."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    *data, done = [line.removeprefix("data: ") for line in lines]
    assert done == "[DONE]"
    return [json.loads(one) for one in data]
