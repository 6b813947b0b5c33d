"""Is this member of the pod alive? Asked by a container's health check, so it must cost little.

::

    python -P -m bus.control.healthcheck SERVICE INDEX      exit code 0 = healthy, 1 = not; one line says why

The gateway is asked over HTTP (`/health` answers 200 only when a request can be served). Every other member
is healthy while its owner lock is held: a process that holds it but hangs is found by its heartbeats and
fenced by the manager, so the check need not repeat that. Only the standard library is imported and no
settings are parsed: the whole check costs some 50 ms, an import of a role ten times as much.

Environment: `XDS_RUNTIME_DIR` (required but for the gateway), `XDS_GATEWAY__PORT` (8000).
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from bus.control import lock

HTTP_TIMEOUT_S = 3.0
_STATUS_LINE_BYTES_MAX = 1024


def check_member(service: str, index: int) -> str | None:
    """Return what is wrong with a member, None when it is healthy."""
    if service == "gateway":
        return check_gateway("127.0.0.1", int(os.environ.get("XDS_GATEWAY__PORT", "8000")))
    return check_owner_lock(Path(os.environ["XDS_RUNTIME_DIR"]) / "locks" / f"{service}-{index}.lock")


def check_owner_lock(path: Path) -> str | None:
    """Return what is wrong with the owner of the lock file `path`, None when a living process holds it."""
    return None if lock.is_locked(path) else f"nobody holds {path}"


def check_gateway(host: str, port: int, timeout_s: float = HTTP_TIMEOUT_S) -> str | None:
    """Return why the gateway at `host`:`port` cannot serve a request now, None when it can."""
    try:
        status_line = _get_health(host, port, timeout_s)
    except OSError as error:
        return f"no answer from {host}:{port}: {error}"
    words = status_line.split(b" ", 2)
    if len(words) > 1 and words[0].startswith(b"HTTP/") and words[1] == b"200":
        return None
    return f"/health answered {status_line.decode('ascii', 'replace')!r}"


def _get_health(host: str, port: int, timeout_s: float) -> bytes:
    """Return the status line of `GET /health`. To import `http.client` would cost more than the check."""
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.sendall(
            f"GET /health HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode()
        )
        received = b""
        while b"\r\n" not in received and len(received) < _STATUS_LINE_BYTES_MAX:
            chunk = connection.recv(_STATUS_LINE_BYTES_MAX)
            if not chunk:
                break
            received += chunk
    return received.partition(b"\r\n")[0]


def main(arguments: list[str] | None = None) -> int:
    """Run the check that the command line names; return the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) != 2 or not words[1].isdecimal():
        print("usage: python -P -m bus.control.healthcheck SERVICE INDEX", file=sys.stderr)
        return 2
    if words[0] != "gateway" and not os.environ.get("XDS_RUNTIME_DIR"):
        print("healthcheck: XDS_RUNTIME_DIR is not set", file=sys.stderr)
        return 2
    wrong = check_member(words[0], int(words[1]))
    print(f"{words[0]}-{words[1]}: {wrong or 'healthy'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
