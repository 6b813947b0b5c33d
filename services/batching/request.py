"""One request as its scheduler sees it, its states, and when it is finished.

State and the collection that a request in it lives in:

    WAITING       never computed                                 Batcher.waiting
    RUNNING       has blocks; takes part in steps                Batcher.running
    PREEMPTED     lost its blocks or its prefill, starts over    Batcher.waiting (at the front)
    PREFILLING    is computed elsewhere                          RemotePrefill.prefilling
    PREFILLED     its KV is offered, and waits for blocks        RemotePrefill.prefilled
    TRANSFERRING  its KV is being received                       RemotePrefill.transferring
    OFFERED       computed here; blocks stay for who fetches it  PrefillBatcher.offered (services/shell)
    FINISHED_*    over; nothing refers to it                     none (its blocks may still retire)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from bus.block_hash import BlockHash, extend_hashes
from bus.control.messages import AddRequest, FinishReason, KvTicket, SamplingParams, TokenLogprob


class RequestStatus(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    OFFERED = "offered"
    PREFILLING = "prefilling"
    PREFILLED = "prefilled"
    TRANSFERRING = "transferring"
    FINISHED_STOP = "finished_stop"
    FINISHED_LENGTH = "finished_length"
    FINISHED_ABORT = "finished_abort"
    FINISHED_ERROR = "finished_error"


AWAY = frozenset({RequestStatus.PREFILLING, RequestStatus.PREFILLED, RequestStatus.TRANSFERRING})
FINISHED = frozenset(
    {
        RequestStatus.FINISHED_STOP,
        RequestStatus.FINISHED_LENGTH,
        RequestStatus.FINISHED_ABORT,
        RequestStatus.FINISHED_ERROR,
    }
)

TRANSITIONS: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.WAITING: FINISHED | {RequestStatus.RUNNING, RequestStatus.PREFILLING},
    RequestStatus.RUNNING: FINISHED | {RequestStatus.PREEMPTED, RequestStatus.OFFERED},
    RequestStatus.PREEMPTED: FINISHED | {RequestStatus.RUNNING, RequestStatus.PREFILLING},
    RequestStatus.PREFILLING: FINISHED | {RequestStatus.PREFILLED, RequestStatus.PREEMPTED},
    RequestStatus.PREFILLED: FINISHED | {RequestStatus.TRANSFERRING, RequestStatus.PREEMPTED},
    RequestStatus.TRANSFERRING: FINISHED | {RequestStatus.RUNNING, RequestStatus.PREEMPTED},
    RequestStatus.OFFERED: FINISHED,
    **{status: frozenset() for status in FINISHED},
}


class Finish(NamedTuple):
    """Why a request is over. `stop_token_id` is -1 unless a token stopped it."""

    reason: FinishReason
    stop_token_id: int = -1


@dataclass(slots=True, eq=False)
class Request:
    """Tokens known, tokens computed, blocks held.

        | 0 ......... num_prompt_tokens | ...... num_tokens |      token_ids
        | 0 ... num_computed_tokens |                              positions whose KV is in block_ids

    Compared by identity: an id may come back with a later attempt.
    """

    gateway: str
    request_id: str
    attempt: int
    sampling: SamplingParams
    num_prompt_tokens: int
    token_ids: list[int]
    arrived_at_ns: int
    stop_ids: frozenset[int]
    wants_prompt_logprobs: bool
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)  # of full blocks of token_ids; may lag behind
    num_published_blocks: int = 0  # so many of block_ids, from the first, are named by these hashes
    num_cached_tokens: int = -1  # prompt tokens that its first admission found cached; -1 = not looked up
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    stays: bool = False  # waiting, and not to be handed over
    task_id: int = 0  # of its prefill elsewhere; 0 = none
    ticket: KvTicket | None = None  # where its KV is offered
    num_prefill_failures: int = 0  # in a row
    num_losses: int = 0  # executors lost under this request since one last completed a step of it

    @classmethod
    def from_message(cls, gateway: str, message: AddRequest, *, now_ns: int) -> Request:
        """Make a request out of what the gateway sent."""
        sampling = message.sampling
        eos_ids = () if sampling.ignore_eos else sampling.eos_token_ids
        return cls(
            gateway=gateway,
            request_id=message.request_id,
            attempt=message.attempt,
            sampling=sampling,
            num_prompt_tokens=len(message.prompt_token_ids),
            token_ids=[*message.prompt_token_ids, *message.output_token_ids],
            arrived_at_ns=now_ns,
            stop_ids=frozenset(eos_ids + sampling.stop_token_ids),
            # They travel with the first tokens, so whoever has tokens has them already.
            wants_prompt_logprobs=sampling.prompt_logprobs >= 0 and not message.output_token_ids,
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known, those of earlier attempts included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def samples(self) -> bool:
        """Whether it draws tokens at all; `max_tokens` 0 only asks for the prompt's log-probabilities."""
        return self.sampling.max_tokens > 0

    @property
    def allow_stop(self) -> bool:
        """Whether the next token may be an eos or stop token."""
        return self.num_output_tokens >= self.sampling.min_tokens

    def extend_block_hashes(self, root: BlockHash, block_tokens: int) -> list[BlockHash]:
        """Return the hashes of all full blocks of `token_ids`, computed or not."""
        extend_hashes(self.block_hashes, root, self.token_ids, block_tokens)
        return self.block_hashes

    def move_to(self, status: RequestStatus) -> None:
        """Change the state along `TRANSITIONS`."""
        assert status in TRANSITIONS[self.status], f"{self.request_id}: {self.status.name} -> {status.name}"
        self.status = status

    def take_prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Return the prompt's log-probabilities the first time, nothing afterwards."""
        taken = tuple(self.prompt_logprobs)
        self.prompt_logprobs = []
        self.wants_prompt_logprobs = False
        return taken

    def forget_computed(self) -> None:
        """Start over: nothing is computed. Tokens stay, so the recomputed request goes on where it was."""
        self.num_computed_tokens = 0
        self.num_published_blocks = 0
        self.prompt_logprobs = []

    def finish(self) -> Finish | None:
        """Tell why the request is over, None while it is not.

        The window needs no rule of its own: prompt + max_tokens beyond it were refused at admission.
        """
        num_output_tokens = self.num_output_tokens
        if num_output_tokens > self.sampling.min_tokens and self.token_ids[-1] in self.stop_ids:
            return Finish("stop", self.token_ids[-1])
        if num_output_tokens >= self.sampling.max_tokens and not self.wants_prompt_logprobs:
            return Finish("length")
        return None
