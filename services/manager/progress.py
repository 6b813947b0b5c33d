"""What `xds up` tells people: how far the start is, and how to use the pod."""

from __future__ import annotations

import json
from typing import TextIO

from bus.config import PodConfig, model_name
from bus.control import endpoints, messages
from bus.control.podmap import find
from services.manager.roster import expected_members

_WIDTH = 100
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


def num_ready(pod_map: messages.PodMap) -> int:
    """Return how many members are ready."""
    return sum(member.state == "ready" for member in pod_map.members)


def progress_line(config: PodConfig, pod_map: messages.PodMap) -> str:
    """Return e.g. `ready 3/9 | expert-0 loading weights 3/8, expert-1 starting`."""
    waiting = []
    for service, index in expected_members(config):
        member = find(pod_map, service, index)
        if member is None or member.state != "ready":
            doing = (member.detail or member.state) if member else "not started"
            waiting.append(f"{endpoints.member_name(service, index)} {doing}")
    line = f"ready {num_ready(pod_map)}/{len(expected_members(config))}"
    return f"{line} | {', '.join(waiting)}" if waiting else line


def base_url(config: PodConfig, pod_map: messages.PodMap) -> str:
    """Return the URL under which this machine reaches the gateway."""
    gateway = find(pod_map, "gateway", 0)
    host = _WILDCARDS.get(config.gateway.host, config.gateway.host)
    own = f"http://{host}:{config.gateway.port}"
    return gateway.http if gateway and gateway.http and host == config.gateway.host else own


def ready_text(config: PodConfig, pod_map: messages.PodMap, duration_s: float) -> str:
    """Return what to print when every member is ready."""
    total = len(expected_members(config))
    url, model = base_url(config, pod_map), model_name(config)
    body = json.dumps(
        {
            "model": model,
            "prompt": "def fibonacci(",
            "max_tokens": 48,
            "temperature": 0.4,
            "top_p": 0.95,
            "seed": 1,
        }
    )
    key = " -H 'Authorization: Bearer <your key>'" if config.gateway.api_keys else ""
    return (
        f"READY {total}/{total} processes in {duration_s:.1f} s\n"
        f"  URL    {url}\n"
        f"  model  {model}\n"
        f"  try    curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'\n"
        f"  stop   Ctrl-C\n"
    )


class ProgressPrinter:
    """One line that changes in place on a terminal; elsewhere a line for each change."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_place = stream.isatty()
        self._shown = ""

    def show(self, line: str) -> None:
        """Show the state of the start, if it differs from the one shown."""
        if line == self._shown:
            return
        self._shown = line
        if self._in_place:
            short = line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..."
            self._stream.write(f"\r\x1b[K{short}")
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Print lines of their own."""
        if self._in_place and self._shown:
            self._stream.write("\r\x1b[K")
        self._shown = ""
        self._stream.write(text if text.endswith("\n") else f"{text}\n")
        self._stream.flush()
