"""The shell that every role runs in.

Life cycle of a process:
    1. if a launcher asked for it, die with the launcher (`PR_SET_PDEATHSIG`); one BLAS thread;
    2. parse `--index`, take the settings from `XDS_RESOLVED` (or merge them), set the logs up;
    3. run the role's coroutine in uvloop;
    4. SIGTERM or SIGINT, a refusal, or a failed background task cancels it; it cleans up in `finally` blocks
       and has `launcher.stop_timeout_ms` for that;
    5. exit code: 0 asked to stop, 1 unexpected error (traceback in the log), 2 `ConfigError`, 3
       `ResourceError`, 4 refused by the manager. Errors of kinds 2 to 4 are the last line on stderr, one line
       each.

A role's module ends with::

    def main() -> None:
        process.run(role_main, "expert")
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog
import uvloop
import zmq.asyncio

from bus import config as settings
from bus import cores, logs
from bus.config import PodConfig
from bus.errors import ConfigError, ResourceError
from bus.shutdown import (
    EXIT_CONFIG,
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_RESOURCE,
    Shutdown,
    current_shutdown,
)

RoleMain = Callable[[PodConfig, int], Awaitable[None]]
_PR_SET_PDEATHSIG = 1
BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

log = structlog.get_logger(__name__)


def run(role_main: RoleMain, service: str) -> NoReturn:
    """Run a role until it ends or is told to stop, then exit the process (see the module's text).

    Args:
        role_main: coroutine function (settings, index) -> None. Runs until it is cancelled.
        service: the name of the role.
    """
    _die_with_launcher(os.environ.get("XDS_PDEATHSIG", ""))
    _use_one_blas_thread()
    index = _parse_index(service)
    name = f"{service}-{index}"
    try:
        config = settings.from_resolved(os.environ)
        logs.configure(config, service, index)
        cores.pin(config, service, index)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            exit_code = runner.run(_supervise(role_main, config, index, name))
    except ConfigError as error:
        exit_code = fail(name, error, EXIT_CONFIG)
    except ResourceError as error:
        exit_code = fail(name, error, EXIT_RESOURCE)
    except Exception:
        log.exception("ended by an unexpected error")
        exit_code = EXIT_FAILURE
    _let_messages_leave()
    sys.exit(exit_code)


def fail(name: str, error: object, exit_code: int) -> int:
    """Write the one line about an error that people shall read, and return the exit code."""
    sys.stderr.write(f"{name}: {' '.join(str(error).split())}\n")
    sys.stderr.flush()
    return exit_code


async def _supervise(role_main: RoleMain, config: PodConfig, index: int, name: str) -> int:
    shutdown = Shutdown()
    current_shutdown.set(shutdown)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shutdown.request, EXIT_OK, signal.Signals(number).name)
    main = asyncio.ensure_future(role_main(config, index))
    stopper = asyncio.create_task(shutdown.wait())
    await asyncio.wait({main, stopper}, return_when=asyncio.FIRST_COMPLETED)
    if not main.done():
        log.info("stopping", reason=shutdown.reason)
        await _cancel(main, config.launcher.stop_timeout_ms / 1000)
    stopper.cancel()
    if not main.cancelled() and main.exception() is not None:
        main.result()  # raises it
    if shutdown.exit_code not in (EXIT_OK, EXIT_FAILURE):
        fail(name, shutdown.reason, shutdown.exit_code)
    return shutdown.exit_code


async def _cancel(main: asyncio.Future[None], timeout_s: float) -> None:
    main.cancel()
    await asyncio.wait({main}, timeout=timeout_s)
    if not main.done():
        log.error("did not stop in time", timeout_s=timeout_s)
        os._exit(EXIT_FAILURE)  # nothing else ends a task that ignores its cancellation


def _parse_index(service: str) -> int:
    parser = argparse.ArgumentParser(description=f"One {service} process of an xDeepServe pod.")
    parser.add_argument("--index", type=int, default=0, help="which one of its service (default 0)")
    index: int = parser.parse_args().index
    if not 0 <= index < 64:
        parser.error(f"--index = {index}: must be 0..63")
    return index


def _die_with_launcher(launcher_pid: str) -> None:
    """Have the kernel send SIGTERM when the launcher's main thread ends; leave now if it has already."""
    if not launcher_pid:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if str(os.getppid()) != launcher_pid:
        sys.exit(EXIT_OK)


def _use_one_blas_thread() -> None:
    """Start this program again with the BLAS variables set, unless they are.

    Processes outnumber cores, and NumPy, which reads the variables when it is imported, usually has been
    already.
    """
    missing = {name: "1" for name in BLAS_VARIABLES if name not in os.environ}
    if missing:
        os.execve(sys.executable, sys.orig_argv, os.environ | missing)


def _let_messages_leave() -> None:
    # Waits for lingering messages (a `Goodbye`); sockets bound their own linger. The sockets of other threads belong
    # to the other context, which must not be closed from here.
    zmq.asyncio.Context.instance().destroy(linger=None)
