"""Loads of `xds bench serve`: real arrival times and prefixes of traces, the ideal cache, the two loops."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from bus.errors import ConfigError
from services.bench.serve import workload
from services.bench.serve.workload import END_TOKEN_ID, FIRST_TOKEN_ID, Request, TraceRow, Workload

MOONCAKE = (
    '{"timestamp": 1000, "input_length": 1300, "output_length": 100, "hash_ids": [7, 8, 9]}\n'
    '{"timestamp": 4000, "input_length": 1024, "output_length": 60, "hash_ids": [7, 8]}\n'
    '{"timestamp": 9000, "input_length": 99999, "output_length": 1, "hash_ids": [5]}\n'
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.9951690,396,109\n"
)


def test_mooncake_keeps_times_lengths_and_shared_blocks(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(MOONCAKE)
    rows = workload.read_trace("mooncake", tmp_path / "trace", 10)
    made = workload.replay("mooncake", rows, scale=1 / 32, speed=2, window=2048).make(0)
    first, second = made.requests
    assert made.num_left_out == 1
    assert (first.at_s, second.at_s) == (0.0, 1.5)
    assert (len(first.prompt), len(second.prompt)) == (41, 32)
    assert (first.output_tokens, second.output_tokens) == (3, 2)
    assert first.prompt[:32] == second.prompt
    other = workload.replay("mooncake", rows, scale=1 / 32, speed=2, window=2048).make(1)
    assert other.requests[0].prompt != first.prompt
    assert len(other.requests[0].prompt) == len(first.prompt)


def test_azure_has_times_and_lengths_but_no_prefixes(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(AZURE)
    rows = workload.read_trace("azure", tmp_path / "trace", 10)
    assert [(row.prompt_tokens, row.output_tokens) for row in rows] == [(374, 44), (396, 109)]
    assert rows[1].at_s == pytest.approx(4.314579)
    first, second = workload.replay("azure", rows, scale=0.5, speed=1, window=2048).make(0).requests
    assert (len(first.prompt), len(second.prompt)) == (187, 198)
    assert first.prompt[:16] != second.prompt[:16]


@pytest.mark.parametrize(("kind", "text"), [("mooncake", "a,b\n"), ("azure", "a,b\n1,2\n"), ("azure", "")])
def test_what_is_no_such_trace_is_refused(kind: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ConfigError, match=f"--trace {kind} "):
        workload.read_trace(kind, tmp_path / "trace", 10)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: No such file"):
        workload.read_trace("azure", tmp_path / "nowhere", 10)


def test_the_fitting_scale_is_a_power_of_two_that_fits() -> None:
    rows = [TraceRow(0.0, 7000, 350)] * 10
    assert workload.fitting_scale(rows, 2048) == 1 / 4
    assert workload.fitting_scale(rows, 8000) == 1


def test_an_infinite_cache_holds_full_blocks_of_what_came_before_and_never_a_whole_prompt() -> None:
    prompts = [list(range(8)), [*range(6), 99, 98], list(range(8)), list(range(9)), [5, *range(1, 8)]]
    requests = tuple(Request(float(i), prompt, 1) for i, prompt in enumerate(prompts))
    assert workload.ideal_cached_tokens(Workload(requests), 2) == [0, 6, 6, 8, 0]


def test_poisson_arrivals_have_the_rate_and_come_from_the_seed() -> None:
    load = workload.poisson(10, 2000, 4, 2)
    times = [request.at_s for request in load.make(1).requests]
    assert times == sorted(times) == [request.at_s for request in load.make(1).requests]
    assert times != [request.at_s for request in load.make(2).requests]
    assert times[-1] == pytest.approx(200, rel=0.1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert sum(gap > 0.1 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.05)


def test_a_closed_loop_has_different_prompts_of_one_length() -> None:
    made = workload.closed_loop(3, 5, 40, 7).make(0)
    assert made.clients == 3
    assert {len(request.prompt) for request in made.requests} == {40}
    assert len({tuple(request.prompt) for request in made.requests}) == 5
    assert all(
        FIRST_TOKEN_ID <= token < END_TOKEN_ID for request in made.requests for token in request.prompt
    )
