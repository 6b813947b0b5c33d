"""Laws of placement policies, and of the prefix index against a slow twin."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.placement import POLICIES, Bounds, Candidate
from gateway.prefix_index import PrefixIndex, PromptHasher

NUMBER = st.integers(0, 50)
CANDIDATE = st.builds(
    Candidate,
    dp_group=st.integers(0, 63),
    num_jobs=NUMBER,
    num_tokens=NUMBER,
    kv_tokens=NUMBER,
    is_at_limit=st.booleans(),
    prefix_tokens=NUMBER,
    last_dispatch=NUMBER,
)
CANDIDATES = st.lists(CANDIDATE, min_size=1, max_size=6, unique_by=lambda one: one.dp_group)
BOUNDS = st.builds(Bounds, balance_tokens=NUMBER, prefix_tokens_min=NUMBER)


@given(st.sampled_from(sorted(POLICIES)), CANDIDATES, BOUNDS, st.randoms())
def test_a_policy_names_a_candidate_whatever_their_order(name, candidates, bounds, random) -> None:  # type: ignore[no-untyped-def]
    chosen = POLICIES[name].choose(candidates, bounds)
    assert chosen in candidates
    shuffled = random.sample(candidates, len(candidates))
    assert POLICIES[name].choose(shuffled, bounds) == chosen
    if name in ("kv_usage", "prefix") and chosen.is_at_limit:
        assert all(one.is_at_limit for one in candidates)


@given(CANDIDATES, BOUNDS)
def test_prefix_keeps_the_load_within_the_bound(candidates: list[Candidate], bounds: Bounds) -> None:
    chosen = POLICIES["prefix"].choose(candidates, bounds)
    rivals = [one for one in candidates if one.is_at_limit == chosen.is_at_limit]
    assert chosen.kv_tokens <= min(one.kv_tokens for one in rivals) + bounds.balance_tokens
    near = [
        one for one in rivals if one.kv_tokens <= min(r.kv_tokens for r in rivals) + bounds.balance_tokens
    ]
    longest = max(one.prefix_tokens for one in near)
    if longest >= max(1, bounds.prefix_tokens_min):
        assert chosen.prefix_tokens == longest
    else:
        assert chosen == POLICIES["kv_usage"].choose(candidates, bounds)


@given(st.lists(st.lists(st.integers(0, 1), max_size=6).map(tuple), max_size=12), st.integers(0, 8))
def test_an_index_is_a_bounded_list_of_prefixes(prompts: list[tuple[int, ...]], num_blocks_max: int) -> None:
    """The twin keeps the prefixes themselves in a list, most recently sent first, shorter before longer."""
    index, hasher = PrefixIndex(num_blocks_max), PromptHasher(1, 100)
    twin: list[tuple[int, ...]] = []
    for prompt in prompts:
        known = [end for end in range(1, len(prompt) + 1) if prompt[:end] in twin]
        assert index.match(hasher.hashes(prompt)) == len(known)
        assert known == list(range(1, len(known) + 1)), "a block outlived its predecessor"
        index.add(hasher.hashes(prompt))
        sent = [prompt[:end] for end in range(1, len(prompt) + 1)][:num_blocks_max]
        twin = (sent + [one for one in twin if one not in sent])[:num_blocks_max]
        assert len(index) == len(twin)
