"""Runs one step plan: layers, exchanges with the experts, sampling. Called by the hot loop alone.

Life of a step: move whole blocks as the plan says; lay the plan out as rows; embed; per layer run attention here and,
at a mixture-of-experts layer, hand the normed rows to the experts, wherever they are, and add every pair's result in
top-k order; take the logits of the rows that need them; sample. KV is written at fixed positions, so repeating a step,
or a layer's exchange, is harmless.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bus.control.messages import (
    KvTicket,
    PlannedSequence,
    SampledToken,
    StepCompleted,
    StepPlan,
    TokenLogprob,
)
from services.model import sampling
from services.model.attention_model import AttentionModel, MoeInput
from services.model.batch import Batch
from services.model.grammar import GrammarError
from services.model.kv_cache import KvCache
from services.model.sampler import Sampler
from services.steps.drawn import with_drawn
from services.steps.host_file import HostFile
from services.steps.offers import Offers
from services.steps.rows import StepRows, check_plan, lay_out
from services.steps.slices import attend
from services.steps.step_times import StepTimes

Float32Array = npt.NDArray[np.float32]


class StepAbandoned(Exception):
    """Nobody wants this step's result any more: the worker stops, or the scheduler that asked is gone."""


class ExpertsAway(Exception):
    """Expert workers stayed away longer than `xccl.peer_wait_timeout_ms`; the text names them."""


class ExpertsSide(Protocol):
    """Where the experts are: other processes (attention workers), or here (prefill workers)."""

    wanted: Callable[[], bool]  # False once nobody wants the step's result; long waits look at it
    num_retries: int  # exchanges that had to be sent again

    def exchange(self, layer: int, moe: MoeInput, step_seq: int) -> Float32Array:
        """Return [num_rows, num_slots, hidden] float32: each slot's expert output; valid until the next call.

        `step_seq` grows with every step of this executor, and differs between its incarnations.

        Raises: StepAbandoned, ExpertsAway.
        """
        ...

    def counters(self) -> dict[str, int]:
        """Return what was counted there, by name."""
        ...


@dataclass(slots=True)
class ExecutorCounters:
    """Work done by this worker; read by the control loop for heartbeats."""

    steps: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    copied_blocks: int = 0
    stored_blocks: int = 0  # in the host file
    loaded_blocks: int = 0  # from there


class StepExecutor:
    """Owns the model and the KV cache, and asks `experts` for their part. One thread.

    Args:
        rows_max: the largest step in tokens.
        incarnation: of this process.
        offers: where a prefill worker offers what it has computed; None = plans that ask for it are refused.
        has_common_steps: several executors share the experts, and run steps of the same numbers; one without rows
            takes part in the exchanges.
        beat: called now and then in a step of many rows.
        host: where evicted blocks are kept; None = plans that store or load are refused.
    """

    def __init__(
        self,
        model: AttentionModel,
        kv: KvCache,
        experts: ExpertsSide,
        sampler: Sampler,
        *,
        rows_max: int,
        incarnation: int,
        offers: Offers | None = None,
        has_common_steps: bool = False,
        beat: Callable[[], None] = lambda: None,
        host: HostFile | None = None,
    ):
        self.experts = experts
        self.offers = offers
        self._host = host
        self._model, self._kv, self._sampler = model, kv, sampler
        self._rows_max, self._has_common_steps, self._beat = rows_max, has_common_steps, beat
        # No two incarnations begin alike, so that no event id of a predecessor is ever met again.
        self._step_seq = (incarnation & 0xFFF) << 20
        self.counters = ExecutorCounters()
        self._step_times = StepTimes()
        self._drawn_step_id = -1
        self._drawn: dict[str, int] = {}  # by request id, what that step drew; nothing for those that failed

    def counters_now(self) -> dict[str, int]:
        """Work counted where it happened, and what this worker holds of the model."""
        return {
            **asdict(self.counters),
            **self._step_times.percentiles(),
            **self.experts.counters(),
            "kv_cache_bytes": self._kv.array.nbytes,
            "held_weight_bytes": self._model.weights.held_bytes,
            "held_expert_tensors": sum("experts." in name for name in self._model.weights.tensor_names),
        }

    def run(self, plan: StepPlan, incarnation: int) -> StepCompleted:
        """Compute `plan`.

        Raises:
            ValueError: the plan is out of bounds; nothing was computed.
            NothingDrawn: it lacks the step before; nothing was computed.
            StepAbandoned, ExpertsAway: see there; KV of the planned positions may be partly written.
            OSError: of the host file; nothing in the KV cache can be relied on.
        """
        started = time.monotonic_ns()
        if self._has_common_steps and not plan.sequences:
            return self._take_part(plan.step_id, incarnation)
        plan, abandoned = with_drawn(plan, self._drawn if self._drawn_step_id == plan.step_id - 1 else None)
        if abandoned and not plan.sequences:
            return StepCompleted(step_id=plan.step_id, incarnation=incarnation, sampled=abandoned)
        check_plan(
            plan,
            rows_max=self._rows_max,
            num_blocks=self._kv.num_blocks,
            block_tokens=self._kv.block_tokens,
            vocab_size=self._model.config.vocab_size,
            num_slots=self._host.num_slots if self._host is not None else 0,
        )
        if self.offers is None and any(sequence.offer_kv for sequence in plan.sequences):
            raise ValueError(f"step {plan.step_id}: offer_kv is for prefill workers")
        rows = lay_out(plan)
        if self.offers is not None:
            self.offers.withdraw_written(plan.sequences, self._kv.block_tokens)
        self._move_blocks(plan)
        self._step_seq = plan.step_id if self._has_common_steps else self._step_seq + 1
        num_retries = self.experts.num_retries
        logits = self._forward(rows)
        sampled = self._sample_all(plan, rows, logits)
        self._drawn = {one.request_id: one.token_id for one in sampled if one.token_id >= 0}
        self._drawn_step_id = plan.step_id
        self.counters.steps += 1
        self.counters.computed_tokens += rows.num_rows
        duration_us = (time.monotonic_ns() - started) // 1000
        if rows.num_rows == len(plan.sequences):  # else a prompt is computed
            self._step_times.note(duration_us)
        return StepCompleted(
            step_id=plan.step_id,
            incarnation=incarnation,
            sampled=sampled + abandoned,
            duration_us=duration_us,
            attempts=1 + self.experts.num_retries - num_retries,
        )

    def _move_blocks(self, plan: StepPlan) -> None:
        """Stores, loads, copies, each in order: a block may be stored and then filled anew by one plan."""
        blocks, counters = self._kv.array, self.counters
        if self._host is not None:
            for block_id, slot in plan.stores:
                self._host.store(slot, blocks[block_id])
            for slot, block_id in plan.loads:
                self._host.load(slot, blocks[block_id])
        for source_id, block_id in plan.copies:
            blocks[block_id] = blocks[source_id]
        counters.stored_blocks += len(plan.stores)
        counters.loaded_blocks += len(plan.loads)
        counters.copied_blocks += len(plan.copies)

    def _take_part(self, step_id: int, incarnation: int) -> StepCompleted:
        """Run a step without rows: nothing but the exchanges."""
        config = self._model.config
        none = MoeInput(
            np.empty((0, config.hidden_size), np.float32),
            np.empty((0, config.top_k), np.int32),
            np.empty((0, config.top_k), np.float32),
        )
        for layer in config.moe_layer_indices:
            self.experts.exchange(layer, none, step_id)
        self.counters.steps += 1
        return StepCompleted(step_id=step_id, incarnation=incarnation, sampled=())

    def _forward(self, rows: StepRows) -> Float32Array:
        batch = Batch(
            rows.token_ids, rows.positions, rows.seq_of_row, rows.block_tables, self._kv.block_tokens
        )
        hidden = self._model.embed(batch)
        for layer in range(self._model.config.num_hidden_layers):
            hidden, moe = attend(self._model, layer, hidden, batch, self._kv, self._beat)
            if moe is not None:
                hidden = self._model.add_moe(hidden, self.experts.exchange(layer, moe, self._step_seq), moe)
        return self._model.logits(hidden[rows.logit_rows])

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
                    ticket=None if error else self._offer(sequence),
                )
            )
        return tuple(sampled)

    def _offer(self, sequence: PlannedSequence) -> KvTicket | None:
        if self.offers is None or not sequence.offer_kv:
            return None
        return self.offers.offer(sequence, self._kv.block_tokens)

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
