"""`xds bench model`: refusals, figures, and one short run of our own engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.bench import model as bench
from services.bench.model import Figure, ModelPlan, ModelReport, render, run
from services.cli import main


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch", "0"), "--batch 0: must be in 1 .. 65536"),
        (("--prompt", "70000"), "--prompt 70000: must be in 1 .. 65536"),
        (("--output-tokens", "1"), "--output-tokens 1: must be in 2 .. 4096"),
        (("--rounds", "0"), "--rounds 0: must be in 1 .. 100"),
        (("--peers", "vllm"), "--peers vllm: must be one of transformers, llama.cpp"),
        (("--json", "/nowhere/at/all.json"), "/nowhere/at is not a folder"),
        (("--model", "/nowhere", "--peers", "ours"), "model = '/nowhere': must be a folder"),
    ],
)
def test_wrong_flags_exit_with_2(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "model", *flags]) == 2
    assert message in capsys.readouterr().err


def test_tables_show_ratios_disagreement_and_absence() -> None:
    report = ModelReport(
        figures=[Figure("ours", 8, 128, 1000, 4000, 1.0), Figure("llama.cpp", 8, 128, 500, 6000, 0.9)],
        absent={"transformers": "torch is not installed"},
    )
    text = render(report)
    assert "llama.cpp  500 (0.50)" in text
    assert "llama.cpp  6,000 (1.50)" in text
    assert "llama.cpp, 8 x 128: 90.0%" in text
    assert "transformers: missing: torch is not installed" in text


def test_one_and_two_processes_generate_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, "moe_intermediate_size": 8}
    monkeypatch.setattr("services.bench.checkpoint.SHAPE", {**bench_shape(), **small})
    seen: list[str] = []
    report = run(ModelPlan(batch=(3,), prompt=(5,), output_tokens=3, rounds=1, peers=()), seen.append)
    assert [figure.way for figure in report.figures] == ["ours", "ours, 2 processes", "ours, INT8"]
    assert all(f.decode > 0 and f.prefill > 0 for f in report.figures)
    assert [f.agree for f in report.figures[:2]] == [1, 1]
    assert seen[-1] == "batch 3, prompts of 5 tokens"
    assert json.loads(json.dumps(report.as_json()))["figures"][0]["batch"] == 3


def test_an_engine_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.bench.model.WAYS", (bench.Way("ours", "no_such_engine", 1),))
    with pytest.raises((RuntimeError, ValueError), match="ours"):
        run(ModelPlan(batch=(1,), prompt=(4,), output_tokens=2, rounds=1, peers=()), lambda _: None)


def bench_shape() -> dict[str, object]:
    from services.bench.checkpoint import SHAPE

    return dict(SHAPE)
