"""Grouping of pairs: every pair in exactly one group, whatever arrived together."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.expert.core import group_pairs

arrivals = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 5), min_size=0, max_size=12)), min_size=1, max_size=5
)


@given(arrivals)
def test_every_pair_stands_in_exactly_one_group_of_its_layer_and_expert(
    given_arrivals: list[tuple[int, list[int]]],
) -> None:
    layers = [layer for layer, _ in given_arrivals]
    experts = [np.asarray(e, np.int32) for _, e in given_arrivals]
    seen = set()
    keys = []
    for group in group_pairs(layers, experts):
        keys.append((group.layer, group.expert))
        for source, pair in zip(group.source, group.pair, strict=True):
            assert layers[source] == group.layer
            assert experts[source][pair] == group.expert
            assert (source, pair) not in seen
            seen.add((int(source), int(pair)))
    assert len(seen) == sum(len(e) for e in experts)
    assert keys == sorted(set(keys)), "one group per layer and expert, ascending"


def test_rows_of_several_senders_meet_at_one_expert() -> None:
    groups = group_pairs([2, 2], [np.asarray([4, 1], np.int32), np.asarray([4], np.int32)])
    assert [(g.expert, g.source.tolist(), g.pair.tolist()) for g in groups] == [
        (1, [0], [1]),
        (4, [0, 1], [0, 0]),
    ]
