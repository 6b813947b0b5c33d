"""Flags, figures, tables, JSON and picture of `xds bench serve`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from services import cli
from services.bench.serve.client import Outcome
from services.bench.serve.figures import Percentiles, Slo, figures, gaps_ms
from services.bench.serve.plan import ServePlan, Variant
from services.bench.serve.report import LoadReport
from services.bench.serve.run import Played
from services.bench.serve.scenario import Episodes, LongPromptReport
from services.cli_bench_serve import plan_of

MACHINE = {"cores": 2, "cpu": "some CPU", "kernel": "6.1", "python": "3.11.7"}


def outcome(due_s: float, *chunks_s: float, error: str = "", cached: int = 0) -> Outcome:
    return Outcome(
        due_s=due_s,
        sent_s=due_s + 0.001,
        end_s=chunks_s[-1] if chunks_s else due_s,
        chunks_s=list(chunks_s),
        chunk_tokens=[1] * len(chunks_s),
        num_prompt_tokens=100,
        num_cached_tokens=cached,
        error=error,
    )


def test_figures_count_what_clients_saw() -> None:
    rounds = [
        [outcome(0.0, 0.1, 0.12, 0.14, cached=50), outcome(0.0, 0.3, 0.4, 0.5)],
        [outcome(10.0, 10.1, 10.11, 10.12), outcome(10.0, error="broke")],
    ]
    found = figures(rounds, Slo(ttft_ms=200, tpot_ms=15), ideal_cached_tokens=60)
    assert (found.num_requests, found.num_failed, found.errors) == (4, 1, ("broke",))
    assert found.seconds == pytest.approx(0.5 + 0.12)
    assert found.tokens_per_s == pytest.approx(9 / 0.62)
    assert found.good == 0.25
    assert found.goodput_per_s == pytest.approx(1 / 0.62)
    assert found.ttft_ms.p50 == pytest.approx(100)
    assert found.tpot_ms.p50 == pytest.approx(20)
    assert found.itl_ms.p50 == pytest.approx(20)
    assert found.e2e_ms.p99 > found.e2e_ms.p90 > found.e2e_ms.p50 == pytest.approx(140)
    assert (found.hit_rate, found.ideal_hit_rate) == (pytest.approx(50 / 300), pytest.approx(60 / 300))
    assert found.lag_ms.p50 == pytest.approx(1)


def test_gaps_may_be_restricted_to_a_time() -> None:
    one = outcome(0.0, 1.0, 2.0, 4.0, 8.0)
    assert gaps_ms(one) == [1000, 2000, 4000]
    assert gaps_ms(one, 3.0, 5.0) == [2000]


def test_percentiles_of_nothing_are_nan() -> None:
    assert math.isnan(Percentiles.of([]).p99)


def report() -> LoadReport:
    plan = ServePlan(variants=(Variant("a"), Variant("b")))
    base = Played("load", "a", [[outcome(0.0, 0.1, 0.2, 0.3)]], step_us=(1000.0, 3000.0, 4000.0))
    other = Played("load", "b", [[outcome(0.0, 0.2, 0.4, 0.6)], [outcome(0.0, error="broke")]])
    return LoadReport(plan, MACHINE, [base, other])


def test_the_table_has_a_column_for_each_pod_and_ratios_to_the_first() -> None:
    lines = report().render().splitlines()
    assert "SLO: TTFT 500 ms, TPOT 50 ms" in lines[2]
    assert lines[3].split() == ["a", "b", "ratio"]
    [ttft] = [line for line in lines if line.startswith("TTFT")]
    assert ttft.split("  ")[-1] == "2.00 / 2.00 / 2.00"
    [step] = [line for line in lines if line.startswith("decode step, p99 / p50")]
    assert step.split()[-2:] == ["3.00", "-"]
    assert "b: broke" in lines


def test_a_failed_request_is_a_failure_of_the_run() -> None:
    assert report().has_failures
    assert not LoadReport(ServePlan(), MACHINE, report().played[:1]).has_failures


def test_json_has_all_figures_and_no_nan(tmp_path: Path) -> None:
    report().write_json(tmp_path / "a.json")
    tree = json.loads((tmp_path / "a.json").read_text())
    first, second = tree["loads"]
    assert (first["variant"], first["ttft_ms"]["p50"], first["step_us"]) == (
        "a",
        100.0,
        [1000.0, 3000.0, 4000.0],
    )
    assert second["num_failed"] == 1
    assert first["cached"]["p99"] == 0.0


def test_the_picture_is_written(tmp_path: Path) -> None:
    report().write_plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_long_prompt_report_compares_beside_with_alone(tmp_path: Path) -> None:
    episodes = Episodes("colocated", [2.0] * 10, [5.0] * 10, [outcome(0.0, 7.0)])
    made = LongPromptReport(ServePlan(), MACHINE, [episodes])
    lines = {line.split("  ")[0]: line for line in made.render().splitlines()}
    assert lines["ratio"].endswith("2.50 / 2.50 / 2.50")
    assert lines["TTFT of the long prompt, s"].endswith("7.00")
    made.write_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["pods"][0]["ratio"]["p99"] == 2.5
    made.write_plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--concurrency", "0"), "--concurrency 0: must be in 1 .. 4096"),
        (("--rate", "-1"), "--rate -1: must be in 0.001 .. 100000"),
        (("--rounds", "0"), "--rounds 0: must be in 1 .. 1000"),
        (("--scenario", "nice"), "--scenario nice: must be one of long-prompt, jitter"),
        (("--trace", "splitwise", "x"), "--trace splitwise: must be one of mooncake, azure"),
        (("--compare", "colocated", "colocated"), "each way once"),
        (("--compare", "kv.block=3"), "--compare kv.block=3: 'kv.block=3' must be one of colocated"),
        (("--url", "http://localhost:1", "--compare", "cache-on", "cache-off"), "--url: one running pod"),
        (("--compare", "kv.block_tokens=3"), "kv.block_tokens = 3: must be a power of two"),
        (("--json", "/nowhere/at/all.json"), "/nowhere/at is not a folder"),
        (("--plot", "a.txt"), "--plot a.txt: must end with .png or .svg"),
        (("--url", "http://localhost:1", "--scenario", "long-prompt"), "leave --url out"),
    ],
)
def test_wrong_flags_exit_with_2(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "serve", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_gateway_that_does_not_answer_exits_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "serve", "--url", "http://127.0.0.1:1"]) == 3
    assert "http://127.0.0.1:1/v1/models" in capsys.readouterr().err


def test_flags_become_the_plan() -> None:
    flags = [
        "--rate",
        "2",
        "4",
        "--compare",
        "disaggregated",
        "sync,kv.block_tokens=8",
        "--slo-ttft-ms",
        "9",
    ]
    plan = plan_of(cli._parser().parse_args(["bench", "serve", *flags]))
    assert plan.rates == (2.0, 4.0)
    assert plan.slo == Slo(ttft_ms=9.0, tpot_ms=50.0)
    assert plan.variants[0].overrides == {"topology.prefill_workers": "1"}
    assert plan.variants[1].overrides == {"scheduler.async_scheduling": "false", "kv.block_tokens": "8"}
