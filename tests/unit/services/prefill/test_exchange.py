"""Prefill workers that share the experts: the oracle's bits, whoever computes what; what they do without each other."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bus.config import PodConfig, TopologyConfig, XcclConfig
from bus.control.messages import Member, PodMap, StepCompleted, StepPlan
from bus.memory.segment import Segment
from bus.xccl.dispatch import Dispatcher
from bus.xccl.group import AddressTable
from services.balance.placement import owned_experts
from services.model.expert_model import ExpertModel
from services.model.kv_cache import KvCache
from services.model.sampler import Sampler
from services.prefill.exchange import SharedExperts, dispatch_shape, physical_ids
from services.prefill.experts import LocalExperts
from services.steps.executor import ExpertsAway, StepAbandoned, StepExecutor
from tests.harness.oracle import expected_tokens, oracle
from tests.unit.services.prefill.test_prefill_worker import (
    BLOCK_TOKENS,
    GOLDENS,
    MAX_TOKENS,
    NUM_BLOCKS,
    oracle_rows,
    plan_of,
    rows_of,
)

TIMEOUT_S = 30
EMPTY = StepPlan(step_id=1, scheduler_incarnation=1, sequences=())


class Group:
    """Prefill workers in one process, a thread each."""

    def __init__(self, folder: Path, num_ranks: int, settings: XcclConfig) -> None:
        self.name = f"unit-{uuid.uuid4().hex[:8]}"
        model = oracle(folder).attention
        config = PodConfig(topology=TopologyConfig(prefill_workers=num_ranks), xccl=settings)
        shape = dispatch_shape(config, model.config, MAX_TOKENS)
        self.segments = [
            Segment.create(
                f"/xds-{self.name}-prefill-{rank}-1",
                shape.layout(),
                service="prefill",
                index=rank,
                incarnation=1,
            )
            for rank in range(num_ranks)
        ]
        self.pod_map = PodMap(pod="unit", epoch=1, members=tuple(map(self._member, range(num_ranks))))
        self.experts: list[SharedExperts] = []
        self.kv: list[KvCache] = []
        self.executors: list[StepExecutor] = []
        for rank, segment in enumerate(self.segments):
            table = AddressTable()
            owned = owned_experts(model.config.num_experts, num_ranks, rank)
            experts = ExpertModel.load(folder, model.config, owned, model.config.has_shared_expert)
            shared = SharedExperts(
                Dispatcher(segment, shape, rank, table, config=settings, service="prefill"),
                table,
                experts,
                LocalExperts(experts, segment.beat, wire_int8=settings.int8),
                settings,
                rank=rank,
                num_ranks=num_ranks,
                beat=segment.beat,
            )
            shared.pod_map = lambda: self.pod_map
            self.experts.append(shared)
            self.kv.append(model.allocate_kv(None, NUM_BLOCKS, BLOCK_TOKENS))
            self.executors.append(
                StepExecutor(
                    model,
                    self.kv[-1],
                    shared,
                    Sampler(folder, model.config.vocab_size),
                    rows_max=MAX_TOKENS,
                    incarnation=1,
                    has_common_steps=True,
                )
            )

    def _member(self, rank: int) -> Member:
        return Member(
            service="prefill",
            index=rank,
            incarnation=1,
            pid=1,
            state="ready",
            segment=self.segments[rank].name,
        )

    def step(self, plans: list[StepPlan]) -> list[StepCompleted]:
        """Run one plan on each worker, all at once."""
        with ThreadPoolExecutor(len(plans)) as pool:
            runs: list[Callable[[], StepCompleted]] = [
                lambda executor=executor, plan=plan: executor.run(plan, 1)  # type: ignore[misc]
                for executor, plan in zip(self.executors, plans, strict=True)
            ]
            return [future.result(TIMEOUT_S) for future in [pool.submit(run) for run in runs]]

    def close(self) -> None:
        for experts in self.experts:
            experts.close()
        for segment in self.segments:
            segment.unlink()


@contextmanager
def group(folder: Path, num_ranks: int, **settings: object) -> Iterator[Group]:
    made = Group(folder, num_ranks, msgspec.convert(settings, XcclConfig))
    try:
        yield made
    finally:
        made.close()


def prefill(tokens: tuple[int, ...], step_id: int) -> StepPlan:
    plan = plan_of(tokens, step_id=step_id)
    sequences = tuple(msgspec.structs.replace(one, offer_kv=False) for one in plan.sequences)
    return msgspec.structs.replace(plan, sequences=sequences)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("int8", [False, True])
def test_tokens_and_kv_are_the_oracles(family: str, num_ranks: int, int8: bool) -> None:
    folder = GOLDENS / family
    model = oracle(folder, wire_int8=int8)
    draw = np.random.default_rng(3)
    with group(folder, num_ranks, int8=int8) as workers:
        for step_id in (1, 2):
            prompts = [
                tuple(int(token) for token in draw.integers(0, model.config.vocab_size, 30 - 9 * rank))
                for rank in range(num_ranks)
            ]
            answers = workers.step([prefill(prompt, step_id) for prompt in prompts])
            for rank, prompt in enumerate(prompts):
                assert [answers[rank].sampled[0].token_id] == expected_tokens(model, prompt, 1)
                rows = rows_of(workers.kv[rank], tuple(range(12)), len(prompt))
                assert rows == oracle_rows(model, prompt)
        assert all(experts.counters()["expert_rows"] > 0 for experts in workers.experts)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("int8", [False, True])
def test_a_worker_without_rows_takes_part(family: str, int8: bool) -> None:
    folder = GOLDENS / family
    model = oracle(folder, wire_int8=int8)
    with group(folder, 2, int8=int8) as workers:
        full, empty = workers.step([prefill(tuple(range(20)), 1), EMPTY])
        assert [full.sampled[0].token_id] == expected_tokens(model, tuple(range(20)), 1)
        assert empty.sampled == () and workers.experts[1].counters()["expert_rows"] > 0


def test_a_silent_worker_makes_the_others_give_the_step_up_and_go_on_with_the_next() -> None:
    folder = GOLDENS / "qwen3_moe"
    with group(folder, 2, stall_timeout_ms=50) as workers:
        with pytest.raises(ExpertsAway, match="prefill-1"):
            workers.executors[0].run(prefill((1, 2, 3), 1), 1)
        answers = workers.step([prefill((1, 2, 3), 2), msgspec.structs.replace(EMPTY, step_id=2)])
        assert [answers[0].sampled[0].token_id] == expected_tokens(folder, (1, 2, 3), 1)


def test_an_unknown_worker_is_waited_for() -> None:
    with group(GOLDENS / "qwen3_moe", 2, peer_wait_timeout_ms=50) as workers:
        workers.experts[0].pod_map = lambda: PodMap(pod="unit", epoch=0)
        with pytest.raises(ExpertsAway, match="prefill-1 away for 50 ms"):
            workers.executors[0].run(EMPTY, 1)
        workers.experts[0].wanted = lambda: False
        with pytest.raises(StepAbandoned):
            workers.executors[0].run(EMPTY, 1)


def test_places_are_the_owners() -> None:
    config = oracle(GOLDENS / "qwen3_moe").config
    for num_ranks in (1, 2, 3, config.num_experts):
        places = physical_ids(config, num_ranks)
        num_local = -(-config.num_experts // num_ranks)
        for rank in range(num_ranks):
            owned = list(owned_experts(config.num_experts, num_ranks, rank))
            assert [*places[owned]] == [rank * num_local + local for local in range(len(owned))]
