"""`xds bench serve`: measure whole pods under load (services/bench/serve)."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from bus.config import PodConfig
from bus.errors import ConfigError
from bus.shutdown import EXIT_FAILURE, EXIT_OK

SIGNALLED = 128  # plus the number of the signal


class Interrupted(BaseException):
    """A signal asks for the end; pods end on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = SIGNALLED + number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags. Without any load: closed loops of 1, 8 and 32 clients."""
    parser.add_argument(
        "--url", metavar="URL", help="measure the pod that runs there, instead of starting one"
    )
    parser.add_argument("--model", metavar="DIR", help="checkpoint of the pods (default: demo)")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="WAY",
        help="a pod for each, in turns, ratios to the first. WAY: colocated, disaggregated, gc-auto, gc-managed, sync, "
        "async, cache-on, cache-off, SETTING=VALUE, or several of them with commas",
    )
    parser.add_argument("--scenario", metavar="NAME", help="long-prompt or jitter, instead of a load")
    parser.add_argument("--trace", nargs=2, metavar=("KIND", "FILE"), help="replay; KIND: mooncake or azure")
    for flag, kind, text in (
        ("--trace-requests", int, "first N requests of the trace (default: 100)"),
        ("--scale", float, "factor on the trace's lengths (default: 1 / 2^n so that 99 %% fit the window)"),
        ("--speed", float, "divisor of the trace's times (default: 1)"),
        ("--requests", int, "of each rate and concurrency (default: 64)"),
        ("--prompt", int, "tokens of each prompt (default: 32)"),
        ("--output-tokens", int, "of each request (default: 128)"),
        ("--long-prompt-tokens", int, "of the scenario long-prompt (default: 32768)"),
        ("--rounds", int, "turns of each pod (default: 1)"),
        ("--seed", int, "of prompts and arrivals (default: 0)"),
    ):
        parser.add_argument(flag, type=kind, metavar="N", help=text)
    parser.add_argument("--rate", type=float, nargs="+", metavar="R", help="open loop, Poisson, requests/s")
    parser.add_argument("--concurrency", type=int, nargs="+", metavar="N", help="closed loop, clients")
    parser.add_argument("--slo-ttft-ms", type=float, metavar="MS", help="of goodput (default: 500)")
    parser.add_argument("--slo-tpot-ms", type=float, metavar="MS", help="of goodput (default: 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as .png or .svg")


def bench(config: PodConfig, options: argparse.Namespace) -> int:
    """Run, print the tables, write what was asked for; 1 if a request failed."""
    # Not above: every `xds` command reads this file, only this one needs NumPy.
    from services.bench.serve import scenario

    plan = plan_of(options)
    _check_files(options)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        report = scenario.run(plan, config, lambda text: print(text, file=sys.stderr, flush=True))
    except Interrupted as interruption:
        sys.stderr.write("xds: bench: interrupted\n")
        return interruption.exit_code
    sys.stdout.write(report.render())
    if options.json is not None:
        report.write_json(options.json)
    if options.plot is not None:
        report.write_plot(options.plot)
    return EXIT_FAILURE if report.has_failures else EXIT_OK


def plan_of(options: argparse.Namespace) -> Any:
    """Return the `ServePlan` that the flags describe. Raises ConfigError."""
    from services.bench.serve.figures import Slo
    from services.bench.serve.plan import ServePlan, Variant

    standard = ServePlan()
    given = {
        "scenario": options.scenario,
        "url": options.url,
        "variants": options.compare and tuple(map(Variant.parse, options.compare)),
        "trace": options.trace and (options.trace[0], Path(options.trace[1])),
        "trace_requests": options.trace_requests,
        "scale": options.scale,
        "speed": options.speed,
        "rates": options.rate and tuple(options.rate),
        "clients": options.concurrency and tuple(options.concurrency),
        "num_requests": options.requests,
        "prompt_tokens": options.prompt,
        "output_tokens": options.output_tokens,
        "long_tokens": options.long_prompt_tokens,
        "rounds": options.rounds,
        "seed": options.seed,
        "slo": Slo(
            ttft_ms=standard.slo.ttft_ms if options.slo_ttft_ms is None else options.slo_ttft_ms,
            tpot_ms=standard.slo.tpot_ms if options.slo_tpot_ms is None else options.slo_tpot_ms,
        ),
    }
    plan = ServePlan(**{name: value for name, value in given.items() if value is not None})
    plan.check()
    return plan


def _check_files(options: argparse.Namespace) -> None:
    from bus.bench import plot

    if options.plot is not None:
        plot.check(options.plot)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {options.json}: {options.json.parent} is not a folder")


def _interrupt(number: int, _: FrameType | None) -> None:
    for again in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(again, signal.SIG_IGN)  # cleaning up is not interrupted
    raise Interrupted(number)
