"""The launcher (`xds up`): starts the processes of a local pod, starts dead ones again, stops them all.

Life cycle:
    1. take the pod's lock (a second pod of the same name is refused); check model and port; wait for what a
       killed launcher left behind; clear its files and segments away;
    2. start every member, each in a session of its own;
    3. SIGCHLD: start the dead member again, at once, or after a growing delay if it dies early again and
       again. A member that ends with exit code 2, 3 or 4 before the pod was healthy once ends the start: its
       error is ours;
    4. ask the manager for the pod's state: show the progress, say READY, notice a hung manager (all other
       members are watched by the manager);
    5. SIGINT, SIGTERM, SIGHUP: stop gateway, schedulers, shell, attention, prefill, experts, manager, in this
       order; SIGTERM first, SIGKILL after `launcher.stop_timeout_ms`; a second signal kills at once;
    6. sweep segments, remove the runtime folder, give the lock back.

It decides nothing about the pod and holds no state that matters: when it is killed, the kernel ends its
children (`PR_SET_PDEATHSIG`), which is why they are started by the main thread.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Mapping
from typing import TextIO

from bus.clock import NS_PER_MS, NS_PER_S, Deadline, now_ns
from bus.config import PodConfig
from bus.control import endpoints, messages, rpc
from bus.control.podmap import find
from bus.control.sockets import Dealer
from bus.errors import RequestTimeout
from bus.shutdown import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK, EXIT_REFUSED, EXIT_RESOURCE
from services.manager import preflight
from services.manager.child import MODULES, Child, environ_of
from services.manager.progress import ProgressPrinter, progress_line, ready_text
from services.manager.roster import expected_members

STOP_ORDER = ("gateway", "scheduler", "shell", "attention", "prefill", "expert", "manager")
_FATAL_AT_START = (EXIT_CONFIG, EXIT_RESOURCE, EXIT_REFUSED)
_POLL_STARTING_S = 0.1
_POLL_HEALTHY_S = 1.0
_ASK_TIMEOUT_MS = 1_000
_KILL_WAIT_MS = 5_000


class Launcher:
    """Supervisor of one pod.

    Args:
        config: the pod's settings, loaded and validated.
        modules: which module to run for each service.
        verbose: children write to our stderr instead of log files.
        out: where progress goes.
    """

    def __init__(
        self,
        config: PodConfig,
        *,
        modules: Mapping[str, str] = MODULES,
        verbose: bool = False,
        out: TextIO = sys.stdout,
    ) -> None:
        self._config = config
        self._modules = modules
        self._verbose = verbose
        self._printer = ProgressPrinter(out)
        self._children: list[Child] = []
        self._wake = asyncio.Event()
        self._stopping = False
        self._killing = False
        self._exit_code = EXIT_OK
        self._error = ""
        self._was_healthy = False

    async def run(self) -> int:
        """Run the pod until a signal or a failed start ends it; return the exit code.

        Raises:
            ConfigError, ResourceError: it cannot even begin; nothing is left behind.
        """
        self._handle_signals()
        pod_lock = preflight.take_pod(self._config)
        try:
            preflight.check_model(self._config)
            preflight.check_port(self._config)
            await preflight.wait_members_gone(self._config)
            preflight.clear_files(self._config)
            self._report_left(await preflight.sweep_segments(self._config))
            if not self._stopping:
                await self._serve()
        finally:
            await self._stop_children()
            if not preflight.any_member_lives(self._config):
                self._report_left(await preflight.sweep_segments(self._config))
                preflight.remove_files(self._config)
            pod_lock.release()
        if self._error:
            sys.stderr.write(f"{self._error}\n")
        return self._exit_code

    # ------------------------------------------------------------------ serving

    async def _serve(self) -> None:
        self._start_children()
        watcher = asyncio.create_task(self._watch_pod())
        try:
            while not self._stopping:
                self._wake.clear()
                self._tend_children(now_ns())
                if not self._stopping:
                    await self._sleep_until(self._next_restart_ns())
                if watcher.done():
                    watcher.result()
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    def _start_children(self) -> None:
        environ = environ_of(self._config, os.environ) | {"XDS_PDEATHSIG": str(os.getpid())}
        logs = endpoints.logs_dir(self._config)
        logs.mkdir(mode=0o700, exist_ok=True)
        for key in expected_members(self._config):
            service, index = key
            log_path = None if self._verbose else logs / f"{endpoints.member_name(service, index)}.log"
            child = Child(key, self._modules[service], environ, log_path, self._config.launcher)
            self._children.append(child)
            child.start(now_ns())

    def _tend_children(self, time_ns: int) -> None:
        for child in self._children:
            pid = child.pid
            code = child.reap()
            if code is not None:
                self._on_death(child, pid, code, time_ns)
            if self._stopping:
                return
            if child.restart_at_ns is not None and child.restart_at_ns <= time_ns:
                child.start(time_ns)

    def _on_death(self, child: Child, pid: int, code: int, time_ns: int) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code in _FATAL_AT_START and not self._was_healthy:
            self._fail(code, child.last_line() or f"{child.name} {how}")
            return
        delay_ms = child.plan_restart(time_ns)
        again = f"starting again in {delay_ms} ms" if delay_ms else "starting again"
        self._printer.say(f"{child.name} (pid {pid}) {how}; {again}")

    def _next_restart_ns(self) -> int | None:
        times = [child.restart_at_ns for child in self._children if child.restart_at_ns is not None]
        return min(times, default=None)

    async def _sleep_until(self, time_ns: int | None) -> None:
        delay_s = None if time_ns is None else max(0, time_ns - now_ns()) / NS_PER_S
        try:
            async with asyncio.timeout(delay_s):
                await self._wake.wait()
        except TimeoutError:
            return

    def _fail(self, exit_code: int, error: str) -> None:
        if not self._stopping:
            self._exit_code, self._error = exit_code, error
            self._stopping = True
            self._wake.set()

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._wake.set)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_stop_signal)

    def _on_stop_signal(self) -> None:
        self._killing = self._stopping
        self._stopping = True
        self._wake.set()

    # ------------------------------------------------------------------ watching the pod through its manager

    async def _watch_pod(self) -> None:
        dealer = Dealer(endpoints.manager_endpoint(self._config), b"", messages.Status)
        started_ns = progressed_ns = answered_ns = now_ns()
        shown = ""
        try:
            for number in itertools.count():
                pod_map = await self._ask(dealer, str(number))
                time_ns = now_ns()
                if pod_map is None:
                    self._kill_hung_manager(answered_ns, time_ns)
                else:
                    answered_ns = time_ns
                    self._remember_ready(pod_map)
                if pod_map is not None and not self._was_healthy:
                    line = progress_line(self._config, pod_map)
                    progressed_ns = time_ns if line != shown else progressed_ns
                    shown = line
                    self._show_start(pod_map, line, (time_ns - started_ns) / NS_PER_S)
                self._check_start_timeout(shown, time_ns - progressed_ns)
                for child in self._children:
                    child.bound_log()
                healthy = pod_map is not None and pod_map.healthy
                await asyncio.sleep(_POLL_HEALTHY_S if healthy else _POLL_STARTING_S)
        finally:
            dealer.close()
            self._wake.set()

    async def _ask(self, dealer: Dealer, request_id: str) -> messages.PodMap | None:
        question = messages.GetStatus(request_id=request_id)
        try:
            status = await rpc.request(dealer, question, messages.Status, Deadline.after_ms(_ASK_TIMEOUT_MS))
        except RequestTimeout:
            return None
        return status.pod_map

    def _remember_ready(self, pod_map: messages.PodMap) -> None:
        for child in self._children:
            member = find(pod_map, child.service, child.index)
            if member is not None and member.state == "ready" and member.pid == child.pid:
                child.was_ready = True

    def _show_start(self, pod_map: messages.PodMap, line: str, duration_s: float) -> None:
        if pod_map.healthy:
            self._was_healthy = True
            self._printer.say(ready_text(self._config, pod_map, duration_s))
        else:
            self._printer.show(line)

    def _check_start_timeout(self, shown: str, silent_ns: int) -> None:
        timeout_ms = self._config.launcher.start_timeout_ms
        if not self._was_healthy and silent_ns > timeout_ms * NS_PER_MS:
            self._fail(EXIT_FAILURE, f"no progress for {timeout_ms} ms (launcher.start_timeout_ms): {shown}")

    def _kill_hung_manager(self, answered_ns: int, time_ns: int) -> None:
        """A living manager that does not answer is hung: nobody else can see that."""
        timeout_ns = self._config.heartbeat.hang_timeout_ms * NS_PER_MS
        manager = next(child for child in self._children if child.service == "manager")
        patience_ns = timeout_ns if manager.was_ready else self._config.launcher.start_timeout_ms * NS_PER_MS
        if manager.running and time_ns - max(answered_ns, manager.started_ns) > patience_ns:
            self._printer.say(f"{manager.name} (pid {manager.pid}) does not answer; killing it")
            manager.send_signal(signal.SIGKILL)

    # ------------------------------------------------------------------ stopping

    async def _stop_children(self) -> None:
        self._stopping = True
        for service in STOP_ORDER:
            group = [child for child in self._children if child.service == service]
            for child in group:
                child.terminate()
            await self._wait_ended(group, 0 if self._killing else self._config.launcher.stop_timeout_ms)
            for child in group:
                child.send_signal(signal.SIGKILL)
            await self._wait_ended(group, _KILL_WAIT_MS)

    async def _wait_ended(self, group: list[Child], timeout_ms: int) -> None:
        deadline = Deadline.after_ms(timeout_ms)
        killing = self._killing
        while True:
            self._wake.clear()
            for child in group:
                child.reap()
            ended = not any(child.running for child in group)
            if ended or deadline.expired() or self._killing != killing:
                return
            await self._sleep_until(deadline.at_ns)

    def _report_left(self, segments: list[str]) -> None:
        if segments:
            self._printer.say(f"segments of living processes remain: {', '.join(segments)}")
