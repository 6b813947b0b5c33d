"""The TE-shell's laws under settings and faults that hypothesis chooses, and shrinks when they break one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.shell.policies import POLICIES
from services.shell.policies.views import PromptView, WorkerView
from tests.harness.shell_world import ShellWorld

WORKERS = st.builds(
    WorkerView,
    index=st.integers(0, 63),
    num_cached_tokens=st.integers(0, 100),
    load=st.floats(0, 1e9),
    num_free_blocks=st.integers(0, 1000),
)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 20),
    max_waiting_tasks=st.integers(1, 16),
    long_tokens=st.integers(1, 20),
    enable_prefix_caching=st.booleans(),
    enable_chunked_prefill=st.booleans(),
    expert_parallel=st.booleans(),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_every_prompt_is_computed_and_offered(seed: int, policy: str, **chosen: object) -> None:
    ShellWorld(seed, policy=POLICIES[policy], **chosen).run()


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    number=st.integers(0, 1 << 40),
    num_tokens=st.integers(100, 1 << 20),
    workers=st.lists(WORKERS, min_size=1, max_size=8, unique_by=lambda one: one.index),
)
def test_a_policy_is_pure_and_chooses_among_the_workers_that_it_is_given(
    policy: str, number: int, num_tokens: int, workers: list[WorkerView]
) -> None:
    prompt, before = PromptView(number, num_tokens), list(workers)
    chosen = POLICIES[policy](prompt, workers)
    assert chosen in {worker.index for worker in workers}
    assert POLICIES[policy](prompt, workers) == chosen and workers == before
