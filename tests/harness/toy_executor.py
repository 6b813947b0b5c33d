"""An executor and its oracle in which every mistake of a scheduler shows up in the tokens.

The next token is a hash of all tokens before it. The oracle hashes the list; the executor hashes what it
reads back from its KV blocks through the block table, where each entry remembers token, position and, as real
KV does, all tokens before it. A block that two requests write, a block reused while it is still written, a
position that was skipped, a stale table, the right tokens after the wrong ones: each changes the hash.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

from bus.control.messages import (
    ExecutorReady,
    PlannedSequence,
    SampledToken,
    SamplingParams,
    StepCompleted,
    StepFailed,
    StepPlan,
    TokenLogprob,
)
from services.steps.drawn import NothingDrawn, with_drawn


def _digest(tokens: Sequence[int], salt: int) -> int:
    return zlib.crc32(array("q", [*tokens, salt]).tobytes())


def _stop_ids(sampling: SamplingParams) -> tuple[int, ...]:
    return sampling.stop_token_ids + (() if sampling.ignore_eos else sampling.eos_token_ids)


def next_token(tokens: Sequence[int], sampling: SamplingParams, *, allow_stop: bool, vocab_size: int) -> int:
    """Draw the token after `tokens`, keyed by seed and position as the real sampler is."""
    masked = () if allow_stop else _stop_ids(sampling)
    token_id = _digest(tokens, sampling.seed) % vocab_size
    while token_id in masked:
        token_id = (token_id + 1) % vocab_size
    return token_id


def prompt_logprob(tokens: Sequence[int], following: int) -> TokenLogprob:
    """Return the made-up log-probability of `following` after `tokens`."""
    return TokenLogprob(token_id=following, logprob=-float(_digest(tokens, following) % 1000))


def oracle_outputs(prompt: Sequence[int], sampling: SamplingParams, vocab_size: int) -> list[int]:
    """Return all output tokens of a request, the one that stops it included."""
    outputs: list[int] = []
    while len(outputs) < sampling.max_tokens:
        allow_stop = len(outputs) >= sampling.min_tokens
        token_id = next_token([*prompt, *outputs], sampling, allow_stop=allow_stop, vocab_size=vocab_size)
        outputs.append(token_id)
        if allow_stop and token_id in _stop_ids(sampling):
            break
    return outputs


Entry = tuple[int, int, int]  # position, token, digest of all tokens up to it


def kv_entries(tokens: Sequence[int]) -> list[Entry]:
    """Return what the KV of `tokens` remembers."""
    entries, context = [], 0
    for position, token_id in enumerate(tokens):
        context = _digest((context,), token_id)
        entries.append((position, token_id, context))
    return entries


def oracle_prompt_logprobs(prompt: Sequence[int]) -> list[TokenLogprob]:
    """Return the log-probabilities of prompt positions 1 .. n-1."""
    return [prompt_logprob(prompt[:end], prompt[end]) for end in range(1, len(prompt))]


class ToyExecutor:
    """One incarnation. Its blocks begin with garbage, as a fresh segment's may."""

    def __init__(self, ready: ExecutorReady) -> None:
        self.ready = ready
        self._slots: dict[int, Entry] = {}
        self._drawn_step_id = -1
        self._drawn: dict[str, int] = {}
        self._host_blocks: dict[int, list[Entry]] = {}

    def run(self, plan: StepPlan) -> StepCompleted | StepFailed:
        """Move blocks, write the KV of every planned token, draw. A plan may go on with what the step before drew."""
        incarnation = self.ready.incarnation
        try:
            plan, _ = with_drawn(plan, self._drawn if self._drawn_step_id == plan.step_id - 1 else None)
        except NothingDrawn as error:
            return StepFailed(
                step_id=plan.step_id, incarnation=incarnation, code="nothing_drawn", message=str(error)
            )
        self._move(plan)
        for sequence in plan.sequences:
            for offset, token_id in enumerate(sequence.token_ids):
                position = sequence.start + offset
                before = self._entry(sequence, position - 1)[2] if position else 0
                context = _digest((before,), token_id)
                self._slots[self._slot(sequence, position)] = (position, token_id, context)
        sampled = tuple(self._sample(sequence) for sequence in plan.sequences)
        self._drawn = {one.request_id: one.token_id for one in sampled}
        self._drawn_step_id = plan.step_id
        return StepCompleted(step_id=plan.step_id, incarnation=incarnation, sampled=sampled)

    def _move(self, plan: StepPlan) -> None:
        for block_id, slot in plan.stores:
            assert 0 <= slot < self.ready.num_host_blocks
            self._host_blocks[slot] = self._block(block_id)
        for slot, block_id in plan.loads:
            self.receive(block_id, self._host_blocks[slot])
        for source_id, block_id in plan.copies:
            self.receive(block_id, self._block(source_id))

    def _block(self, block_id: int) -> list[Entry]:
        first = block_id * self.ready.block_tokens
        return [self._slots.get(slot, (-1, -1, -1)) for slot in range(first, first + self.ready.block_tokens)]

    def receive(self, block_id: int, entries: Sequence[Entry]) -> None:
        """Write a block that was fetched."""
        first = block_id * self.ready.block_tokens
        self._slots.update(enumerate(entries, first))

    def _entry(self, sequence: PlannedSequence, position: int) -> Entry:
        slot = self._slot(sequence, position)
        return self._slots.get(slot) or (-1, -self.ready.incarnation * 1000 - slot, -1)

    def read_blocks(self, block_ids: Sequence[int], num_tokens: int, block_tokens: int) -> list[Entry]:
        """Return what the first `num_tokens` entries of these blocks hold."""
        slots = [block * block_tokens + offset for block in block_ids for offset in range(block_tokens)]
        return [self._slots[slot] for slot in slots[:num_tokens]]

    def _slot(self, sequence: PlannedSequence, position: int) -> int:
        block, offset = divmod(position, self.ready.block_tokens)
        return sequence.block_table[block] * self.ready.block_tokens + offset

    def _read(self, sequence: PlannedSequence, end: int) -> list[int]:
        """Return the tokens at positions 0 .. end - 1; a foreign entry reads as -1, which no token is."""
        entries = [self._entry(sequence, position) for position in range(end)]
        tokens, context = [], 0
        for position, (at, token_id, kept) in enumerate(entries):
            context = _digest((context,), token_id)
            tokens.append(token_id if (at, kept) == (position, context) else -1)
        return tokens

    def _sample(self, sequence: PlannedSequence) -> SampledToken:
        tokens = self._read(sequence, sequence.start + len(sequence.token_ids))
        token_id = -1
        if sequence.sample:
            assert sequence.sampling is not None
            self._check_history(sequence, tokens)
            token_id = next_token(
                tokens, sequence.sampling, allow_stop=sequence.allow_stop, vocab_size=self.ready.vocab_size
            )
        prompt_logprobs = tuple(
            prompt_logprob(tokens[: sequence.start + offset + 1], following)
            for offset, following in enumerate(sequence.next_prompt_token_ids)
        )
        return SampledToken(
            request_id=sequence.request_id, token_id=token_id, prompt_logprobs=prompt_logprobs
        )

    @staticmethod
    def _check_history(sequence: PlannedSequence, tokens: list[int]) -> None:
        """The tokens that penalties and grammars look at are those that were computed, and are sent only then."""
        assert sequence.sampling is not None
        prompt, output = tokens[: sequence.num_prompt_tokens], tokens[sequence.num_prompt_tokens :]
        sent = list(sequence.output_token_ids)
        assert sent == (output if sequence.sampling.uses_outputs else []), "not the tokens that were computed"
        wanted = prompt if sequence.sampling.uses_prompt else []
        assert list(sequence.prompt_token_ids) == wanted, "not the tokens that were computed"
