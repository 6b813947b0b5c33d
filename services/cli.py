"""`xds`, the one command: parses, loads the settings, hands over to `cli_*`, the launcher or `doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bus import config as settings
from bus.config import PodConfig
from bus.errors import BusError, ConfigError, ResourceError
from bus.shutdown import EXIT_CONFIG, EXIT_FAILURE, EXIT_RESOURCE
from services import cli_bench, cli_bench_model, cli_bench_serve, cli_quantize

EXIT_CODES = """\
exit codes:
  0  done, or the pod was asked to stop
  1  it failed; for `status`: the pod is not healthy
  2  a setting or an argument is wrong
  3  the machine lacks something (a port, memory, a name); for `status`, `down`, `kill`: no such pod runs
  4  the pod refused the process

settings: defaults < --config pod.toml < environment XDS_* (XDS_SCHEDULER__MAX_NUM_SEQS=8) < flags and --set
"""
SERVICES = ("manager", "gateway", "scheduler", "attention", "expert", "shell", "prefill")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _dispatch(options, _load(options))
    except ConfigError as error:
        return _fail(error, EXIT_CONFIG)
    except ResourceError as error:
        return _fail(error, EXIT_RESOURCE)
    except BusError as error:
        return _fail(error, EXIT_FAILURE)
    except BrokenPipeError:  # `xds status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def _fail(error: BusError, exit_code: int) -> int:
    sys.stderr.write(f"xds: {' '.join(str(error).split())}\n")
    return exit_code


def _dispatch(options: argparse.Namespace, config: PodConfig) -> int:
    # Each command imports what it needs: `xds status` shall not wait for what only `xds doctor` uses.
    match options.command:
        case "up":
            from services.cli_pod import up

            return up(config, verbose=options.verbose)
        case "down":
            from services.cli_pod import down

            return down(config)
        case "run":
            from services.cli_pod import run

            return run(config, options.service, options.index)
        case "kill":
            from services.cli_pod import kill

            return kill(config, options.target, options.signal)
        case "status":
            from services.cli_status import status

            return status(config, as_json=options.json)
        case "doctor":
            from services.doctor import doctor

            return doctor(config)
        case "quantize":
            return cli_quantize.quantize(options)
        case "bench" if options.subject == "bus":
            return cli_bench.bench(config, options)
        case "bench" if options.subject == "serve":
            return cli_bench_serve.bench(config, options)
        case "bench":
            return cli_bench_model.bench(options)
        case _:
            return _print_config(config)


def _print_config(config: PodConfig) -> int:
    for name in settings.settings():
        value: object = config
        for part in name.split("."):
            value = getattr(value, part)
        shown = ["***" for _ in config.gateway.api_keys] if name == "gateway.api_keys" else value
        sys.stdout.write(f"{name} = {_toml(shown)}\n")
    return 0


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return str(value)


def _load(options: argparse.Namespace) -> PodConfig:
    overrides: dict[str, str] = {}
    for assignment in options.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: must be NAME=VALUE, e.g. scheduler.max_num_seqs=8")
        overrides[name.strip()] = text.strip()
    for name in settings.settings():
        value = getattr(options, name, None)  # flags have the setting's name as their destination
        if value is not None:
            overrides[name] = value
    path = options.config or os.environ.get("XDS_CONFIG")
    return settings.load(overrides, Path(path) if path else None, os.environ)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--pod", help="name of the pod (default: xds)")
    shared.add_argument("--config", metavar="FILE", help="settings in TOML")
    shared.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="any setting; see `xds config`"
    )
    parser = argparse.ArgumentParser(
        prog="xds",
        description="xDeepServe on one machine.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[shared])

    _add_up_flags(add("up", "start a pod and supervise it until Ctrl-C"))
    add("down", "stop the pod that `xds up` started")
    run = add("run", "run one service in the foreground; what Compose uses")
    run.add_argument("service", choices=SERVICES, metavar="SERVICE", help=", ".join(SERVICES))
    run.add_argument("--index", type=int, default=0, metavar="I")
    status = add("status", "show every process of the pod")
    status.add_argument("--json", action="store_true", help="one JSON object on one line")
    kill = add("kill", "send a signal to one process, or to all of a service")
    kill.add_argument("target", metavar="SERVICE[/I]")
    kill.add_argument("--signal", choices=("KILL", "STOP", "CONT", "TERM"), default="KILL")
    add("doctor", "check that this machine can run a pod")
    bench = commands.add_parser("bench", help="measure against others", description="Measure against others.")
    subjects = bench.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for subject, text, add_arguments in (
        ("bus", "the bus against other transports", cli_bench.add_arguments),
        ("model", "the engine alone against transformers and llama.cpp", cli_bench_model.add_arguments),
        ("serve", "whole pods under load, over HTTP", cli_bench_serve.add_arguments),
    ):
        add_arguments(subjects.add_parser(subject, help=text, description=text, parents=[shared]))
    cli_quantize.add_arguments(add("quantize", "write a checkpoint in INT8"))
    add("config", "print the settings that are in force, as TOML keys")
    return parser


def _add_up_flags(up: argparse.ArgumentParser) -> None:
    defaults = settings.settings()
    for flag, name, metavar, text in (
        ("--model", "model", "DIR", "folder of a checkpoint, or demo"),
        ("--host", "gateway.host", "H", "address that the gateway binds"),
        ("--port", "gateway.port", "N", "its port; 0 = any"),
        ("--dp-groups", "topology.dp_groups", "N", "schedulers, each with an attention worker"),
        ("--expert-workers", "topology.expert_workers", "N", "processes that hold the experts"),
        (
            "--prefill-workers",
            "topology.prefill_workers",
            "N",
            "processes that compute prompts; 0 = DP groups do",
        ),
    ):
        up.add_argument(flag, dest=name, metavar=metavar, help=f"{text} (default: {defaults[name]})")
    up.add_argument("--verbose", action="store_true", help="show the logs of all processes")


if __name__ == "__main__":
    sys.exit(main())
