"""What a prefill worker computes and offers: the oracle's token, and the very bytes of the oracle's KV.

The TE-shell's core plans, the executor computes, both with the real model; only sockets are missing.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest

from bus.control.messages import PlannedSequence, SamplingParams, StepPlan
from bus.distflow.source import KvSource
from bus.distflow.table import TransferLayout
from bus.memory.layout import SegmentLayout
from bus.memory.segment import Segment
from services.model.batch import Batch
from services.model.kv_cache import KvCache
from services.model.reference import ReferenceModel
from services.model.sampler import Sampler
from services.prefill.experts import LocalExperts, load_experts
from services.shell.events import FromWorker
from services.steps import slices
from services.steps.executor import StepAbandoned, StepExecutor
from services.steps.offers import Offers
from tests.harness.oracle import expected_tokens, oracle
from tests.harness.shelling import ShellDriver, create_shell, create_task

GOLDENS = Path(__file__).parents[3] / "parity" / "goldens"
NUM_BLOCKS, BLOCK_TOKENS, MAX_TOKENS = 64, 4, 48


class RealWorker:
    """Takes the place of `ToyPrefillWorker`."""

    def __init__(self, folder: Path, *, wire_int8: bool = False) -> None:
        model = oracle(folder).attention
        layout = TransferLayout(NUM_BLOCKS, model.kv_bytes(1, BLOCK_TOKENS), NUM_BLOCKS, num_sinks=1)
        segment = Segment.create(
            f"/xds-unit-{uuid.uuid4().hex[:8]}-prefill-0-1",
            SegmentLayout(0, 0, layout.app_bytes),
            service="prefill",
            index=0,
            incarnation=1,
        )
        segment.unlink()
        self.segment = segment
        self.kv = model.allocate_kv(segment.app, NUM_BLOCKS, BLOCK_TOKENS)
        self.num_beats = 0
        experts = LocalExperts(
            load_experts(folder, model.config, range(model.config.num_experts)),
            self._beat,
            wire_int8=wire_int8,
        )
        self.executor = StepExecutor(
            model,
            self.kv,
            experts,
            Sampler(folder, model.config.vocab_size),
            rows_max=MAX_TOKENS,
            incarnation=1,
            offers=Offers(KvSource(segment, layout), 1),
        )

    def _beat(self) -> None:
        self.num_beats += 1


def drive(driver: ShellDriver, worker: RealWorker) -> None:
    """Compute until nothing is planned any more."""
    done = -1
    while driver.plan().step_id != done:
        done = driver.plan().step_id
        driver.feed(FromWorker(0, worker.executor.run(driver.plan(), 1)))


def rows_of(kv: KvCache, block_ids: tuple[int, ...], num_tokens: int) -> bytes:
    """Return all that a cache holds of a sequence, in the order of its tokens."""
    layers = range(kv.spec.num_layers)
    kept = [view(layer)[list(block_ids)] for layer in layers for view in (kv.k, kv.v)]
    return b"".join(one.reshape(-1, *one.shape[2:])[:num_tokens].tobytes() for one in kept)


def oracle_rows(model: ReferenceModel, tokens: tuple[int, ...]) -> bytes:
    kv = model.attention.allocate_kv(None, NUM_BLOCKS, BLOCK_TOKENS)
    num_blocks = -(-len(tokens) // BLOCK_TOKENS)
    table = np.arange(num_blocks, dtype=np.int32)[None]
    ids, positions = np.asarray(tokens, np.int64), np.arange(len(tokens), dtype=np.int32)
    model.forward(Batch(ids, positions, np.zeros(len(tokens), np.int32), table, BLOCK_TOKENS), kv)
    return rows_of(kv, tuple(range(num_blocks)), len(tokens))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe", "llama"])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("caching", [True, False])
def test_tokens_and_kv_are_the_oracles(family: str, chunked: bool, caching: bool) -> None:
    folder = GOLDENS / family
    model, worker = oracle(folder), RealWorker(folder)
    core = create_shell(
        max_num_batched_tokens=11, enable_chunked_prefill=chunked, enable_prefix_caching=caching
    )
    driver = ShellDriver(core, num_blocks=NUM_BLOCKS, vocab_size=model.config.vocab_size)
    draw = np.random.default_rng(7)
    long = tuple(int(token) for token in draw.integers(0, model.config.vocab_size, 40))
    prompts = [long, long[:9], (*long[:17], 3), long[20:33]]
    driver.add(*(create_task(number, prompt, ignore_eos=True) for number, prompt in enumerate(prompts, 1)))
    drive(driver, worker)
    assert sorted(done.task_id for done in driver.completed()) == [1, 2, 3, 4]
    for done in driver.completed():
        prompt, ticket = prompts[done.task_id - 1], done.ticket
        assert [done.sampled.token_id] == expected_tokens(folder, prompt, 1)
        assert ticket.num_tokens == len(prompt)
        assert rows_of(worker.kv, ticket.block_ids, len(prompt)) == oracle_rows(model, prompt)
    assert core.snapshot()["prefix_cache_hits"] > 0 or not caching


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe", "llama"])
def test_a_step_of_many_rows_is_done_in_slices(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_ROWS", 7)
    worker = RealWorker(GOLDENS / family)
    tokens = tuple(range(3, 43))
    beats: list[int] = []
    worker.executor._beat = lambda: beats.append(1)
    answer = worker.executor.run(plan_of(tokens), 1)
    assert [answer.sampled[0].token_id] == expected_tokens(GOLDENS / family, tokens, 1)
    assert rows_of(worker.kv, tuple(range(10)), 40) == oracle_rows(oracle(GOLDENS / family), tokens)
    assert len(beats) == 5 * oracle(GOLDENS / family).config.num_hidden_layers


def test_rows_are_rounded_as_they_are_on_their_way_to_expert_workers() -> None:
    folder = GOLDENS / "qwen3_moe"
    model = oracle(folder, wire_int8=True)
    worker = RealWorker(folder, wire_int8=True)
    worker.executor.run(plan_of(tuple(range(20))), 1)
    rows = rows_of(worker.kv, tuple(range(5)), 20)
    assert rows == oracle_rows(model, tuple(range(20)))
    assert rows != oracle_rows(oracle(folder), tuple(range(20)))


def plan_of(
    tokens: tuple[int, ...], *, block_ids: tuple[int, ...] = tuple(range(12)), step_id: int = 1
) -> StepPlan:
    sequence = PlannedSequence(
        request_id="a",
        token_ids=tokens,
        start=0,
        block_table=block_ids,
        sample=True,
        sampling=SamplingParams(max_tokens=1, temperature=0.0),
        offer_kv=True,
    )
    return StepPlan(step_id=step_id, scheduler_incarnation=1, sequences=(sequence,))


def test_a_plan_that_writes_offered_blocks_ends_their_offer() -> None:
    worker = RealWorker(GOLDENS / "qwen3_moe")
    offers = worker.executor.offers
    assert offers is not None
    first = worker.executor.run(plan_of((1, 2, 3), block_ids=(4, 5)), 1).sampled[0].ticket
    second = worker.executor.run(plan_of((1, 2, 3), block_ids=(6,)), 1).sampled[0].ticket
    assert first is not None and second is not None and offers.ended() == ()
    worker.executor.run(plan_of((7,), block_ids=(4,)), 1)
    assert offers.ended() == (first.serial,) and offers.num_standing == 2
    offers.withdraw([second.serial, 99])
    assert offers.ended() == (second.serial,)
    offers.reset()
    assert offers.ended() == () and offers.num_standing == 0


def test_whoever_cannot_offer_refuses_to() -> None:
    worker = RealWorker(GOLDENS / "qwen3_moe")
    worker.executor.offers = None
    with pytest.raises(ValueError, match="offer_kv"):
        worker.executor.run(plan_of((1, 2, 3)), 1)


def test_a_step_that_nobody_wants_is_given_up() -> None:
    worker = RealWorker(GOLDENS / "qwen3_moe")
    worker.executor.experts.wanted = lambda: False
    with pytest.raises(StepAbandoned):
        worker.executor.run(plan_of((1, 2, 3)), 1)


def test_a_long_step_shows_that_it_lives() -> None:
    worker = RealWorker(GOLDENS / "qwen3_moe")
    worker.executor.run(plan_of(tuple(range(40))), 1)
    layers = oracle(GOLDENS / "qwen3_moe").config.moe_layer_indices
    assert worker.num_beats > len(layers)
