"""Why this process must end: said once by whoever finds out, acted upon by the process shell.

Signals, a refusal by the manager and a failed background task all only record a reason here. The shell
(`bus.process`) waits for it, cancels the role's main task and ends with the exit code. A role that runs
outside the shell (in a test) has no shutdown, and requests are kept by whoever made them.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIG = 2
EXIT_RESOURCE = 3
EXIT_REFUSED = 4


class Shutdown:
    """The first reason wins. Event loop only."""

    def __init__(self) -> None:
        self.exit_code = EXIT_OK
        self.reason = ""
        self._requested = asyncio.Event()

    def request(self, exit_code: int, reason: str) -> None:
        """Ask for the end of the process; later requests change nothing."""
        if not self._requested.is_set():
            self.exit_code = exit_code
            self.reason = reason
            self._requested.set()

    async def wait(self) -> None:
        """Return when the end has been asked for."""
        await self._requested.wait()


current_shutdown: ContextVar[Shutdown | None] = ContextVar("current_shutdown", default=None)
