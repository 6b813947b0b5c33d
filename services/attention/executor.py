"""Runs one step plan: layers, exchanges with the experts, sampling. Called by the hot loop alone.

Life of a step: lay the plan out as rows; embed; per layer run attention here and, at a mixture-of-experts layer, hand
the normed rows to the expert workers (A2E), wait for every pair's result (E2A) and add them in top-k order; take the
logits of the rows that need them; sample. KV is written at fixed positions, so repeating a step, or a layer's exchange,
is harmless.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import structlog

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.control.messages import PlannedSequence, PodMap, SampledToken, StepCompleted, StepPlan, TokenLogprob
from bus.errors import PeerDied, PeerStalled, SegmentCorrupt
from bus.memory.segment import Segment
from bus.xccl.endpoint import Rank
from bus.xccl.event import Event
from bus.xccl.group import AddressTable
from bus.xccl.trampoline import RoutedAttention
from services.attention.core import ExpertDirectory, StepRows, check_plan, lay_out
from services.balance.placement import ExpertMap
from services.model import sampling
from services.model.attention_model import AttentionModel, MoeInput
from services.model.batch import Batch
from services.model.grammar import GrammarError
from services.model.kv_cache import KvCache
from services.model.sampler import Sampler

Float32Array = npt.NDArray[np.float32]

_MAP_POLL_S = 0.02


class StepAbandoned(Exception):
    """Nobody wants this step's result any more: the worker stops, or the scheduler that asked is gone."""


class ExpertsAway(Exception):
    """Expert workers stayed away longer than `xccl.peer_wait_timeout_ms`; the text names them."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The way to the expert workers: the exchange, and the addresses that it looks up."""

    side: RoutedAttention
    table: AddressTable


@dataclass(slots=True)
class ExecutorCounters:
    """Work done by this worker; read by the control loop for heartbeats."""

    steps: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    exchanges: int = 0
    exchange_retries: int = 0


class StepExecutor:
    """Owns the model, the KV cache and the attention side of the exchange. One thread."""

    def __init__(
        self,
        model: AttentionModel,
        kv: KvCache,
        experts: Experts,
        segment: Segment,
        expert_map: ExpertMap,
        settings: XcclConfig,
        *,
        dp_rank: int,
        rows_max: int,
        num_blocks: int,
        block_tokens: int,
        sampler: Sampler,
    ):
        """`rows_max` is the largest step in tokens; KV holds `num_blocks` blocks of `block_tokens` tokens."""
        self._model, self._kv, self._segment = model, kv, segment
        self._side, self._table = experts.side, experts.table
        self._expert_map, self._settings, self._dp_rank = expert_map, settings, dp_rank
        self._rows_max, self._num_blocks, self._block_tokens = rows_max, num_blocks, block_tokens
        self._sampler = sampler
        self._directory = ExpertDirectory(expert_map.num_expert_ranks)
        self._num_slots = model.config.top_k + int(expert_map.has_shared_expert)
        self._expert_out = np.zeros((rows_max, self._num_slots, model.config.hidden_size), np.float32)
        # No two incarnations begin alike, so that no event id of a predecessor is ever met again.
        self._step_seq = (segment.incarnation & 0xFFF) << 20
        self._log = structlog.get_logger()
        self.counters = ExecutorCounters()
        self.pod_map: Callable[[], PodMap] = lambda: PodMap(pod="", epoch=0)
        self.wanted: Callable[[], bool] = lambda: True

    def counters_now(self) -> dict[str, int]:
        """Work counted where it happened, and what this worker holds of the model."""
        return {
            **asdict(self.counters),
            "trampoline_exchanges": self._side.stats()["trampoline_exchanges"],
            "kv_cache_bytes": self._kv.array.nbytes,
            "held_weight_bytes": self._model.weights.held_bytes,
            "held_expert_tensors": sum("experts." in name for name in self._model.weights.tensor_names),
        }

    def run(self, plan: StepPlan, incarnation: int) -> StepCompleted:
        """Compute `plan`.

        Raises:
            ValueError: the plan is out of bounds; nothing was computed.
            StepAbandoned, ExpertsAway: see there; KV of the planned positions may be partly written.
        """
        started = time.monotonic_ns()
        check_plan(
            plan,
            rows_max=self._rows_max,
            num_blocks=self._num_blocks,
            block_tokens=self._block_tokens,
            vocab_size=self._model.config.vocab_size,
        )
        rows = lay_out(plan)
        self._step_seq += 1
        retries = self.counters.exchange_retries
        logits = self._forward(rows)
        sampled = self._sample_all(plan, rows, logits)
        self.counters.steps += 1
        self.counters.computed_tokens += rows.num_rows
        return StepCompleted(
            step_id=plan.step_id,
            incarnation=incarnation,
            sampled=sampled,
            duration_us=(time.monotonic_ns() - started) // 1000,
            attempts=1 + self.counters.exchange_retries - retries,
        )

    def _forward(self, rows: StepRows) -> Float32Array:
        batch = Batch(rows.token_ids, rows.positions, rows.seq_of_row, rows.block_tables, self._block_tokens)
        hidden = self._model.embed(batch)
        for layer in range(self._model.config.num_hidden_layers):
            hidden, moe = self._model.attend(layer, hidden, batch, self._kv)
            if moe is not None:
                hidden = self._model.add_moe(hidden, self._exchange(layer, moe), moe)
        return self._model.logits(hidden[rows.logit_rows])

    # ------------------------------------------------------------------ exchange with the experts

    def _exchange(self, layer: int, moe: MoeInput) -> Float32Array:
        slots = self._expert_map.slots(moe.topk_idx, self._dp_rank + self._step_seq)
        slot_expert, slot_rank = map(np.ascontiguousarray, slots)
        out = self._expert_out[: moe.x.shape[0]]
        give_up = Deadline.after_ms(self._settings.peer_wait_timeout_ms)
        attempt = 0
        while True:
            attempt += 1
            self._connect_experts(give_up)
            event = Event(step=self._step_seq, layer=layer, attempt=attempt)
            try:
                handle = self._side.a2e_send(moe.x, slot_rank, slot_expert, event)
                self._side.e2a_recv(handle, out, Deadline.after_ms(self._settings.stall_timeout_ms))
                self._segment.beat()
            except (PeerDied, PeerStalled, SegmentCorrupt) as error:
                self._note_loss(error, give_up)
                continue
            self.counters.exchanges += 1
            return out

    def _note_loss(self, error: PeerDied | PeerStalled | SegmentCorrupt, give_up: Deadline) -> None:
        self.counters.exchange_retries += 1
        self._log.warning("exchange_retry", error=str(error))
        self._note_dead()
        if give_up.expired():
            raise ExpertsAway(str(error)) from error

    def _note_dead(self) -> None:
        for index in range(self._expert_map.num_expert_ranks):
            rank = Rank("expert", index)
            incarnation = self._table.incarnation(rank)
            if incarnation and not self._table.alive(rank):
                self._directory.lost(index, incarnation)

    def _connect_experts(self, give_up: Deadline) -> None:
        while True:
            self._attach_new()
            missing = self._directory.missing()
            if not missing:
                return
            if not self.wanted():
                raise StepAbandoned
            if give_up.expired():
                away = ", ".join(f"expert-{r}" for r in missing)
                raise ExpertsAway(f"{away} away for {self._settings.peer_wait_timeout_ms} ms")
            self._segment.beat()
            time.sleep(_MAP_POLL_S)

    def _attach_new(self) -> None:
        for member in self._directory.to_connect(self.pod_map()):
            rank = Rank("expert", member.index)
            self._table.learn(rank, member.incarnation, member.segment)
            try:
                self._table.segment(rank, asker=f"attention-{self._dp_rank}")
            except PeerDied:
                continue  # died in between; the next map names its successor
            self._directory.connected(member.index, member.incarnation)
            self._log.info("expert_connected", rank=member.index, incarnation=member.incarnation)

    # ------------------------------------------------------------------ sampling

    def _sample_all(self, plan: StepPlan, rows: StepRows, logits: Float32Array) -> tuple[SampledToken, ...]:
        sampled = []
        next_row = 0
        for sequence in plan.sequences:
            num_prompt_rows = len(sequence.next_prompt_token_ids)
            prompt = self._prompt_logprobs(sequence, logits[next_row : next_row + num_prompt_rows])
            next_row += num_prompt_rows
            token_id, logprob, error = -1, None, ""
            if sequence.sample:
                try:
                    token_id, logprob = self._sample(sequence, logits[next_row])
                except (GrammarError, ValueError) as failure:
                    error = str(failure)
                next_row += 1
            sampled.append(
                SampledToken(
                    request_id=sequence.request_id,
                    token_id=token_id,
                    logprob=logprob,
                    prompt_logprobs=prompt,
                    error=error,
                )
            )
        return tuple(sampled)

    def _sample(self, sequence: PlannedSequence, logits: Float32Array) -> tuple[int, TokenLogprob | None]:
        params = sequence.sampling
        assert params is not None  # check_plan
        token_id = self._sampler.draw(
            logits,
            params,
            request_id=sequence.request_id,
            position=sequence.start + len(sequence.token_ids),
            allow_stop=sequence.allow_stop,
            prompt_token_ids=sequence.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
        )
        self.counters.sampled_tokens += 1
        if params.logprobs < 0:
            return token_id, None
        return token_id, sampling.token_logprob(logits, token_id, params.logprobs)

    def _prompt_logprobs(self, sequence: PlannedSequence, logits: Float32Array) -> tuple[TokenLogprob, ...]:
        params = sequence.sampling
        if params is None or not sequence.next_prompt_token_ids:
            return ()
        num_top = max(0, params.prompt_logprobs)
        following = sequence.next_prompt_token_ids
        return tuple(
            sampling.token_logprob(row, token, num_top) for row, token in zip(logits, following, strict=True)
        )
