"""`xds bench model`: measure the engine alone against others (services/bench)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bus.errors import ConfigError
from bus.shutdown import EXIT_FAILURE, EXIT_OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--model",
        dest="checkpoint",
        type=Path,
        metavar="DIR",
        help="checkpoint (default: random qwen3_moe, 28.6M)",
    )
    parser.add_argument("--batch", type=int, nargs="+", metavar="N", help="sequences (default: 1 8 32)")
    parser.add_argument(
        "--prompt", type=int, nargs="+", metavar="N", help="prompt tokens (default: 128 1024)"
    )
    parser.add_argument("--output-tokens", type=int, metavar="N", help="generated per sequence (default: 24)")
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each engine (default: 3)")
    parser.add_argument(
        "--peers", metavar="A,B", help="transformers,llama.cpp (default: both; ours = none beside ours)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")


def bench(options: argparse.Namespace) -> int:
    """Run, print the tables, write what was asked for; 1 if our own engine failed."""
    # Not above: every `xds` command reads this file, only this one needs NumPy.
    from services.bench.model import ModelPlan, render, run

    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {options.json}: {options.json.parent} is not a folder")
    given = {
        "model": options.checkpoint,
        "batch": options.batch and tuple(options.batch),
        "prompt": options.prompt and tuple(options.prompt),
        "output_tokens": options.output_tokens,
        "rounds": options.rounds,
        "peers": _peers(options.peers),
    }
    plan = ModelPlan(**{name: value for name, value in given.items() if value is not None})
    try:
        report = run(plan, lambda text: print(text, file=sys.stderr, flush=True))
    except RuntimeError as error:
        sys.stderr.write(f"xds: bench: {error}\n")
        return EXIT_FAILURE
    sys.stdout.write(render(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(), indent=1))
    return EXIT_OK


def _peers(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if names == ("ours",) else names
