from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.control import healthcheck
from bus.control.lock import OwnerLock


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDS_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "locks"
    folder.mkdir()
    return folder


@pytest.fixture
def answer_once() -> Iterator[object]:
    """Yield a function that serves one connection with the given bytes and returns the port."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(5)
    threads: list[threading.Thread] = []

    def serve(answer: bytes) -> int:
        def run() -> None:
            connection, _ = server.accept()
            with connection:
                assert connection.recv(1024).startswith(b"GET /health HTTP/1.1\r\n")
                connection.sendall(answer)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return int(server.getsockname()[1])

    yield serve
    for thread in threads:
        thread.join(5)
    server.close()


def test_a_member_is_healthy_while_its_lock_is_held(locks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = OwnerLock.acquire(locks / "expert-2.lock")
    assert healthcheck.main(["expert", "2"]) == 0
    held.release()
    assert healthcheck.main(["expert", "2"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "expert-2: healthy",
        f"expert-2: nobody holds {locks}/expert-2.lock",
    ]


def test_a_member_that_never_started_is_not_healthy(locks: Path) -> None:
    assert healthcheck.main(["scheduler", "0"]) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", None),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "/health answered 'HTTP/1.1 503 Service Unavailable'"),
        (b"HTTP/1.1 404 200\r\n\r\n", "/health answered 'HTTP/1.1 404 200'"),
        (b"", "/health answered ''"),
        (b"x" * 5000, f"/health answered {'x' * 1024!r}"),
    ],
)
def test_the_gateway_is_healthy_only_when_it_says_so(answer_once, answer, expected) -> None:
    assert healthcheck.check_gateway("127.0.0.1", answer_once(answer)) == expected


def test_a_gateway_that_does_not_listen_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("XDS_GATEWAY__PORT", str(port))
    assert healthcheck.main(["gateway", "0"]) == 1


@pytest.mark.parametrize("words", [[], ["expert"], ["expert", "x"], ["expert", "1", "2"]])
def test_wrong_usage_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert healthcheck.main(words) == 2
    assert capsys.readouterr().err.startswith("usage: ")


def test_a_missing_runtime_dir_is_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDS_RUNTIME_DIR", raising=False)
    assert healthcheck.main(["expert", "0"]) == 2
