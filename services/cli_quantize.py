"""`xds quantize`: write a checkpoint in INT8 and say what it costs and gains (services/quantize)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bus.errors import ConfigError
from bus.shutdown import EXIT_OK

if TYPE_CHECKING:
    from services.quantize.perplexity import Quality
    from services.quantize.quantizer import QuantizeReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--model", dest="checkpoint", required=True, metavar="DIR", help="checkpoint, or demo"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="calibration text (default: Python's own library)",
    )
    parser.add_argument(
        "--eval-text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text to measure perplexity with (default: as above)",
    )
    for flag, default, text in (
        ("--windows", 32, "calibration windows"),
        ("--eval-windows", 16, "windows to measure perplexity with; 0 = do not"),
        ("--window-tokens", 512, "tokens of a window"),
        ("--min-rows", 128, "calibration rows that every expert sees at least"),
        ("--seed", 0, "of the choice of windows"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--strength", type=float, default=0.5, metavar="S", help="of smoothing, 0 .. 1 (default: 0.5)"
    )
    parser.add_argument("--no-gptq", action="store_true", help="round each weight by itself")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")


def quantize(options: argparse.Namespace) -> int:
    """Run and print the report."""
    # Not above: every `xds` command reads this file, only this one needs NumPy and the tokenizer.
    from bus.config import PodConfig, model_path
    from services.quantize.layer import Recipe
    from services.quantize.perplexity import evaluate
    from services.quantize.quantizer import quantize as run
    from services.quantize.text import default_texts, read_texts, windows

    _check(options)
    source = model_path(PodConfig(model=options.checkpoint))
    calibration, held_out = default_texts()
    if options.text:
        calibration = read_texts(options.text)
    if options.eval_text:
        held_out = read_texts(options.eval_text)
    length = options.window_tokens
    token_ids = windows(source, calibration, options.windows, length, options.seed)
    recipe = Recipe(options.strength, compensate=not options.no_gptq, min_rows=options.min_rows)
    report = run(source, options.out, token_ids, recipe, _progress)
    before = after = None
    if options.eval_windows:
        chosen = windows(source, held_out, options.eval_windows, length, options.seed)
        before, after = evaluate(source, chosen), evaluate(options.out, chosen)
    show: Callable[..., str] = _json if options.json else _text
    sys.stdout.write(show(report, before, after))
    return EXIT_OK


def _check(options: argparse.Namespace) -> None:
    for flag, value, low, high in (
        ("--windows", options.windows, 1, 65_536),
        ("--eval-windows", options.eval_windows, 0, 65_536),
        ("--window-tokens", options.window_tokens, 2, 65_536),
        ("--min-rows", options.min_rows, 0, 1 << 20),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{flag} {value}: must be in {low} .. {high}")
    if not 0 <= options.strength <= 1:
        raise ConfigError(f"--strength {options.strength}: must be in 0 .. 1")


def _progress(done: int, total: int) -> None:
    print(f"layer {done} of {total}", file=sys.stderr, flush=True)


def _text(report: QuantizeReport, before: Quality | None, after: Quality | None) -> str:
    name, error = report.worst
    routed, shown = report.fewest_rows
    lines = [
        f"files            {report.source_bytes:,} -> {report.target_bytes:,} bytes",
        f"worst projection {name}: relative squared error {error:.1e}",
        f"expert rows      at least {routed} routed, {shown} with the closest others",
    ]
    if before is not None and after is not None:
        change = after.perplexity / before.perplexity - 1
        lines += [
            f"weights held     {before.weight_bytes:,} -> {after.weight_bytes:,} bytes",
            f"perplexity       {before.perplexity:.4f} -> {after.perplexity:.4f} ({change:+.3%})",
            f"prefill          {before.tokens_per_s:,.0f} -> {after.tokens_per_s:,.0f} tokens/s, one thread",
        ]
    return "\n".join(lines) + "\n"


def _json(report: QuantizeReport, before: Quality | None, after: Quality | None) -> str:
    name, error = report.worst
    values: dict[str, object] = {
        "source_bytes": report.source_bytes,
        "target_bytes": report.target_bytes,
        "worst_projection": name,
        "worst_error": error,
        "fewest_expert_rows": report.fewest_rows,
    }
    for label, quality in (("before", before), ("after", after)):
        if quality is not None:
            values[label] = {
                "perplexity": quality.perplexity,
                "weight_bytes": quality.weight_bytes,
                "tokens_per_s": quality.tokens_per_s,
            }
    return json.dumps(values) + "\n"
