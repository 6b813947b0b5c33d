"""`xds bench bus`: measure the bus against other transports (bus/bench)."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from bus.bench.plan import KINDS, PEERS, SECTIONS, Plan
from bus.config import PodConfig
from bus.errors import ConfigError
from bus.shutdown import EXIT_FAILURE, EXIT_OK

if TYPE_CHECKING:
    from bus.bench.report import Report

SIGNALLED = 128  # plus the number of the signal


class Interrupted(BaseException):
    """A signal asks for the end; whatever runs cleans up on its way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = SIGNALLED + number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    standard = Plan()
    for flag, given, text in (
        ("--only", SECTIONS, "sections"),
        ("--peers", PEERS, "transports beside ours; none with --peers ours"),
        ("--kinds", KINDS, "rows on the wire"),
    ):
        parser.add_argument(flag, type=_names, metavar="A,B", help=f"{text} (default: {','.join(given)})")
    for flag, default, text in (
        ("--sizes", standard.sizes, "bytes of a message"),
        ("--ranks", standard.ranks, "processes of a collective"),
        ("--batch", standard.batch, "tokens per rank"),
        ("--hidden", standard.hidden, "width of a row"),
        ("--top-k", standard.top_k, "experts per token"),
    ):
        shown = " ".join(map(str, default))
        parser.add_argument(flag, type=int, nargs="+", metavar="N", help=f"{text} (default: {shown})")
    parser.add_argument(
        "--experts", type=int, metavar="N", help=f"of the model (default: {standard.num_experts})"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"turns of each way (default: {standard.rounds})"
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter turns: about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as .png or .svg")


def bench(config: PodConfig, options: argparse.Namespace) -> int:
    """Run, print the tables, write what was asked for; 1 if a way that is installed failed."""
    # Not above: every `xds` command reads this file, only this one needs NumPy and the transports.
    from bus.bench.run import run

    plan = plan_of(config, options)
    plan.check()
    _check_files(options)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        report = run(plan)
    except Interrupted as interruption:
        sys.stderr.write("xds: bench: interrupted\n")
        return interruption.exit_code
    _show(report, options)
    failed = [absence for absence in report.absences if absence.is_failure]
    for absence in failed:
        sys.stderr.write(f"xds: bench: {absence.way} failed in {absence.section}: {absence.reason}\n")
    return EXIT_FAILURE if failed else EXIT_OK


def plan_of(config: PodConfig, options: argparse.Namespace) -> Plan:
    """Return the plan that the flags describe."""
    named = {
        "sections": options.only,
        "peers": () if options.peers == ("ours",) else options.peers,
        "kinds": options.kinds,
        "sizes": options.sizes,
        "ranks": options.ranks,
        "batch": options.batch,
        "hidden": options.hidden,
        "top_k": options.top_k,
        "num_experts": options.experts,
        "rounds": options.rounds,
    }
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in named.items()
        if value is not None
    }
    plan: Plan = replace(Plan(xccl=config.xccl), **given)  # type: ignore[arg-type]
    return plan.quick() if options.quick else plan


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


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


def _show(report: Report, options: argparse.Namespace) -> None:
    from bus.bench import plot
    from bus.bench.report import write_json
    from bus.bench.tables import render

    sys.stdout.write(render(report))
    if options.json is not None:
        write_json(report, options.json)
    if options.plot is not None:
        plot.write_plot(report, options.plot)
