"""The wire of the control plane, and only the wire. Helpers live elsewhere.

Every message is a frozen struct whose `type` tag travels with it. Commands are imperative, facts are past
tense, snapshots are nouns. Unknown fields fail. Bodies are orjson, validated into these structs by
`bus.control.codec`. Any change other than appending a field with a default raises `SCHEMA_VERSION`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SCHEMA_VERSION = 1

ServiceName = Literal["gateway", "manager", "shell", "scheduler", "attention", "expert", "prefill"]
MemberState = Literal["starting", "ready", "stopping", "dead"]
FinishReason = Literal["", "stop", "length", "abort"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages."""


# --------------------------------------------------------------------------- membership (member <-> manager)


class Member(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One process as the manager sees it."""

    service: ServiceName
    index: int
    incarnation: int
    pid: int
    state: MemberState
    endpoint: str = ""  # ZeroMQ address that this incarnation serves; "" when it serves none
    segment: str = ""  # its data-plane segment; "" when it has none
    http: str = ""  # the gateway's base URL
    heartbeat_age_ms: int = 0
    counters: dict[str, int] = {}  # work counted where it happened, e.g. expert_rows
    detail: str = ""  # one line for people, e.g. "loading weights 3/8"


class PodMap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Snapshot of the pod. `epoch` grows with every change; an older map than the one held is ignored."""

    pod: str
    epoch: int
    members: tuple[Member, ...] = ()
    healthy: bool = False  # every configured member is ready
    serving_dp_groups: tuple[
        int, ...
    ] = ()  # groups whose scheduler, attention worker and all experts are ready
    expert_map_version: int = 0


class Hello(Message, frozen=True, kw_only=True):
    """Member -> manager, DEALER to ROUTER, at start and whenever the manager asks. Idempotent by incarnation."""

    pod: str
    service: ServiceName
    index: int
    incarnation: int
    pid: int
    config_sha: str
    schema_version: int = SCHEMA_VERSION
    state: MemberState = "starting"
    endpoint: str = ""
    segment: str = ""
    http: str = ""


class Welcome(Message, frozen=True, kw_only=True):
    """Manager -> member: accepted; here is the map."""

    pod_map: PodMap


class Refused(Message, frozen=True, kw_only=True):
    """Manager -> member: not accepted. The member logs `reason` and exits with code 4."""

    reason: str


class Heartbeat(Message, frozen=True, kw_only=True):
    """Member -> manager, sent by the loop it vouches for: at news, else rarely. Loss is harmless."""

    service: ServiceName
    index: int
    incarnation: int
    state: MemberState
    counters: dict[str, int] = {}
    detail: str = ""
    epoch: int = (
        0  # of the map that the member holds; the manager sends the map again when it is older than its own
    )


class IdentifyYourself(Message, frozen=True, kw_only=True):
    """Manager -> member: I do not know you (I restarted); send `Hello`."""


class PodMapPublished(Message, frozen=True, kw_only=True):
    """Manager -> every member on every change. A whole snapshot; loss is healed by the next."""

    pod_map: PodMap


class Goodbye(Message, frozen=True, kw_only=True):
    """Member -> manager: clean stop. At most once."""

    service: ServiceName
    index: int
    incarnation: int


class GetStatus(Message, frozen=True, kw_only=True):
    """`xds status` -> manager. Answered with `Status`."""

    request_id: str


class Status(Message, frozen=True, kw_only=True):
    """Manager -> `xds status`."""

    request_id: str
    pod_map: PodMap


# --------------------------------------------------------------------------- requests (gateway <-> scheduler)


class SamplingParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How tokens are drawn. `temperature` 0 is greedy. `seed` is always set: the gateway draws one if absent.

    Ranges are the gateway's to check. Whoever draws applies the fields in the order of `services.model.sampling`.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    seed: int = 0  # 63-bit; with the absolute position it keys the counter-based generator
    min_tokens: int = 0
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = -1  # -1 = none; n >= 0 = the sampled token's and the n likeliest
    prompt_logprobs: int = -1  # likewise for every prompt token but the first
    min_p: float = 0.0  # tokens less likely than this share of the likeliest are never drawn
    presence_penalty: float = 0.0  # subtracted once from a token that is in the output
    frequency_penalty: float = 0.0  # subtracted for every time that a token is in the output
    repetition_penalty: float = 1.0  # divides (or multiplies, below zero) tokens in prompt or output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    grammar: str = ""  # llguidance's text form; the output is held to it; "" = free
    grammar_after_token_id: int = -1  # the grammar begins behind the first such output token; -1 = at once

    @property
    def uses_outputs(self) -> bool:
        """Whether a draw depends on the tokens that were drawn before it, other than through the logits."""
        return bool(
            self.grammar or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )

    @property
    def uses_prompt(self) -> bool:
        """Whether a draw depends on the prompt's tokens, other than through the logits."""
        return self.repetition_penalty != 1.0


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Natural-log probability of one token and of the likeliest, best first (model's distribution, temperature 1)."""

    token_id: int
    logprob: float
    rank: int = 0  # 1 = the likeliest
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class AddRequest(Message, frozen=True, kw_only=True):
    """Gateway -> scheduler. Idempotent by (request_id, attempt).

    `output_token_ids` are tokens that the client already has (an earlier attempt made them); generation goes
    on after them, and `max_tokens` counts them.
    """

    request_id: str
    attempt: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    sampling: SamplingParams


class RequestAccepted(Message, frozen=True, kw_only=True):
    """Scheduler -> gateway: queued."""

    request_id: str
    attempt: int


class RequestRejected(Message, frozen=True, kw_only=True):
    """Scheduler -> gateway: not queued. `queue_full` may be retried elsewhere or later; the rest may not."""

    request_id: str
    attempt: int
    code: Literal["queue_full", "too_long", "not_ready", "invalid"]
    message: str


class AbortRequest(Message, frozen=True, kw_only=True):
    """Gateway -> scheduler: the client left, or a stop string was met. Unknown ids are ignored."""

    request_id: str
    attempt: int


class TokensGenerated(Message, frozen=True, kw_only=True):
    """Scheduler -> gateway. Idempotent by (request_id, first_index): an index seen before is dropped.

    `first_index` counts output tokens from 0 over all attempts. A `finish_reason` other than "" is the last
    word.
    """

    request_id: str
    attempt: int
    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # once, with the first tokens: prompt positions 1..n-1
    finish_reason: FinishReason = ""
    stop_token_id: int = -1  # the token that stopped it, when finish_reason is "stop"
    num_cached_tokens: int = 0


class RequestFailed(Message, frozen=True, kw_only=True):
    """Scheduler -> gateway: cannot go on. `retryable` = the same request may be tried on another DP group."""

    request_id: str
    attempt: int
    code: str
    message: str
    retryable: bool = False


# --------------------------------------------------------------------------- steps (scheduler <-> attention worker)


class ExecutorReady(Message, frozen=True, kw_only=True):
    """Attention worker -> its scheduler, on connecting and until acknowledged by a plan. Starts a fresh session."""

    index: int
    incarnation: int
    num_blocks: int
    block_tokens: int
    max_model_len: int
    vocab_size: int
    num_host_blocks: int = 0  # blocks that its host file holds besides; 0 = it has none
    host_bytes_per_s: int = 0  # measured, reading that file
    block_bytes: int = 0


DRAWN_BEFORE = (
    -1
)  # in a plan, instead of a token id: what the step before, `step_id` - 1, drew for that request


class PlannedSequence(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What to compute for one request in one step.

    `token_ids` are computed at positions start .. start+n-1 into `block_table`; if `sample`, one token is
    drawn from the last position's logits. Self-contained, so that a step can be repeated by a restarted
    worker; but for `DRAWN_BEFORE`, which may be the last of `token_ids` and `output_token_ids`: then it can only
    follow the step before at the same worker, and fails if that one has failed.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    sample: bool
    sampling: SamplingParams | None = None  # present when `sample` or when prompt logprobs are wanted
    num_prompt_tokens: int = 0
    allow_stop: bool = True  # False while fewer than min_tokens are out: eos and stop ids are masked
    next_prompt_token_ids: tuple[int, ...] = ()  # for prompt logprobs: the token after each row that has one
    prompt_token_ids: tuple[int, ...] = ()  # the whole prompt, where `sampling.uses_prompt`
    output_token_ids: tuple[int, ...] = ()  # all output so far, where `sampling.uses_outputs`
    offer_kv: bool = False  # prefill: offer the blocks for transfer once this step has computed them


class StepPlan(Message, frozen=True, kw_only=True):
    """Scheduler -> attention worker. `step_id` grows by one; a plan of an older scheduler incarnation is ignored.

    Whole blocks are moved before anything is computed: all stores, then all loads, then all copies, each in order.
    """

    step_id: int
    scheduler_incarnation: int
    sequences: tuple[PlannedSequence, ...]
    stores: tuple[tuple[int, int], ...] = ()  # (block, slot of the host file)
    loads: tuple[tuple[int, int], ...] = ()  # (slot of the host file, block)
    copies: tuple[tuple[int, int], ...] = ()  # (from block, to block)


class KvTicket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metadata of a finished prefill: where its KV lies, and what proves that it still lies there.

    The blocks stay pinned until somebody has fetched them or the offer is withdrawn (paper section 6, steps 3 and 8a).
    """

    index: int  # of the prefill worker
    incarnation: int
    segment: str
    slot: int  # of the segment's transfer table
    serial: int  # that the slot holds while the offer stands; unique within the incarnation
    num_tokens: int  # whose KV the blocks hold
    block_ids: tuple[int, ...]  # in the order of the tokens


class SampledToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The token drawn for one planned sequence."""

    request_id: str
    token_id: int  # -1 when the sequence did not sample in this step
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: str = ""  # why no token could be drawn; the request cannot go on
    ticket: KvTicket | None = None  # where the sequence's KV was offered; present when `offer_kv` was asked


class StepCompleted(Message, frozen=True, kw_only=True):
    """Attention worker -> scheduler."""

    step_id: int
    incarnation: int
    sampled: tuple[SampledToken, ...]
    duration_us: int = 0
    attempts: int = 1


class StepFailed(Message, frozen=True, kw_only=True):
    """Attention worker -> scheduler: the step cannot be done (an expert stayed away); its requests are failed."""

    step_id: int
    incarnation: int
    code: str
    message: str


# --------------------------------------------------------------------------- prefill (scheduler <-> prefill leader)


class AddPrefill(Message, frozen=True, kw_only=True):
    """Scheduler -> prefill leader (TE-shell). Idempotent by `task_id`; those of a scheduler's incarnation grow.

    Computes prompt and output tokens so far, and draws the next one.
    """

    task_id: int
    request_id: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    sampling: SamplingParams


class AbortPrefill(Message, frozen=True, kw_only=True):
    """Scheduler -> prefill leader: not wanted any more, computed or not. Unknown ids are ignored."""

    task_id: int


class PrefillCompleted(Message, frozen=True, kw_only=True):
    """Prefill leader -> scheduler: metadata only; the KV moves when the decode side fetches it."""

    task_id: int
    sampled: SampledToken
    ticket: KvTicket
    num_cached_tokens: int = 0  # prompt tokens that the prefill worker had cached


class PrefillFailed(Message, frozen=True, kw_only=True):
    """Prefill leader -> scheduler: the task is forgotten. `retryable` = nothing is wrong with the request."""

    task_id: int
    code: str
    message: str
    retryable: bool = True


# --------------------------------------------------------------------------- KV transfer (an executor and its planner)


class WithdrawOffers(Message, frozen=True, kw_only=True):
    """Prefill leader -> prefill worker: end these offers. Unknown serials are ignored."""

    scheduler_incarnation: int  # the leader's
    serials: tuple[int, ...]


class OffersEnded(Message, frozen=True, kw_only=True):
    """Prefill worker -> prefill leader: fetched or withdrawn; nobody reads these blocks any more. Once per offer."""

    incarnation: int
    serials: tuple[int, ...]


class FetchKv(Message, frozen=True, kw_only=True):
    """Scheduler -> attention worker: receive KV, between steps.

    Blocks `first_block`.. of the ticket go to `block_ids`, in order; those before it are cached here already.
    """

    fetch_id: int
    scheduler_incarnation: int
    ticket: KvTicket
    first_block: int
    block_ids: tuple[int, ...]


class CancelFetch(Message, frozen=True, kw_only=True):
    """Scheduler -> attention worker: stop. The blocks are not written any more when the next message is handled.

    Unknown ids are ignored. Answered by `KvFetched` with an error if the fetch was under way.
    """

    fetch_id: int
    scheduler_incarnation: int


class KvFetched(Message, frozen=True, kw_only=True):
    """Attention worker -> scheduler: the receive is over; `block_ids` are not written any more."""

    fetch_id: int
    incarnation: int
    error: str = ""  # "" = all of it has arrived
