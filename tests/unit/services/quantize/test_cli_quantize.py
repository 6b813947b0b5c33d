"""`xds quantize`: one run on a tiny checkpoint, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.cli import main

GOLDEN = Path(__file__).parents[3] / "parity" / "goldens" / "deepseek_v3"


def test_a_run_reports_cost_and_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    out = tmp_path / "int8"
    flags = ["--windows", "4", "--eval-windows", "2", "--window-tokens", "32", "--text", str(text)]
    command = ["quantize", "--model", str(GOLDEN), "--out", str(out), *flags, "--eval-text", str(text)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target_bytes"] < report["source_bytes"]
    assert report["after"]["weight_bytes"] < report["before"]["weight_bytes"]
    assert report["after"]["perplexity"] == pytest.approx(report["before"]["perplexity"], rel=0.2)
    assert main(command) == 2
    assert f"--out {out}: exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--windows", "0"], "--windows 0: must be in 1 .. 65536"),
        (["--window-tokens", "1"], "--window-tokens 1: must be in 2 .. 65536"),
        (["--strength", "2"], "--strength 2.0: must be in 0 .. 1"),
        (["--text", "/nowhere"], "text: [Errno 2] No such file or directory: '/nowhere'"),
        (["--model", "/nowhere"], "/nowhere: has no tokenizer.json"),
    ],
)
def test_wrong_flags_exit_with_2(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "--model", str(GOLDEN), "--out", str(tmp_path / "x"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
