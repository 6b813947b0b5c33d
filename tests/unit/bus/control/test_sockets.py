from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from bus.clock import Deadline
from bus.control import messages, rpc, sockets
from bus.control.sockets import Dealer, QueueFull, Router, SyncDealer
from bus.errors import ProtocolError, RequestTimeout, ResourceError
from tests.harness.poll import async_eventually

ASK = messages.GetStatus(request_id="1")
ANSWER = messages.Status(request_id="1", pod_map=messages.PodMap(pod="p", epoch=1))


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/r.sock"


@pytest.fixture
def router(endpoint: str) -> Iterator[Router]:
    router = Router(endpoint, messages.GetStatus)
    yield router
    router.close()


@pytest.fixture
def dealer(endpoint: str) -> Iterator[Dealer]:
    dealer = Dealer(endpoint, b"expert-0.1", messages.Status)
    yield dealer
    dealer.close()


async def send(dealer: Dealer, message: messages.Message) -> None:
    await dealer.send_before(message, Deadline.after_ms(5000))


async def test_question_and_answer(router: Router, dealer: Dealer) -> None:
    await send(dealer, ASK)
    assert await router.recv() == (b"expert-0.1", ASK)
    assert router.send(b"expert-0.1", ANSWER)
    assert await dealer.recv() == ANSWER


async def test_the_socket_file_is_private_and_goes(router: Router, tmp_path: Path) -> None:
    assert (tmp_path / "r.sock").stat().st_mode & 0o777 == 0o600
    router.close()
    router.close()
    assert not (tmp_path / "r.sock").exists()


async def test_a_peer_that_is_not_there_is_no_success(router: Router) -> None:
    assert not router.send(b"nobody", ANSWER)


async def test_nothing_is_queued_for_a_server_that_is_not_there(dealer: Dealer) -> None:
    assert not dealer.send(ASK)
    with pytest.raises(RequestTimeout, match=r"r.sock took no GetStatus in time"):
        await dealer.send_before(ASK, Deadline.after_ms(30))


async def test_a_peer_that_does_not_read_is_an_error(
    router: Router, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "QUEUE_MESSAGES_MAX", 2)
    dealer = Dealer(endpoint, b"lazy", messages.Status)
    big = messages.Status(request_id="x" * 100_000, pod_map=ANSWER.pod_map)
    await send(dealer, ASK)
    await router.recv()
    try:
        with pytest.raises(QueueFull, match="lazy does not read: Status not sent"):
            for _ in range(10_000):
                router.send(b"lazy", big)
    finally:
        dealer.close()


@pytest.fixture
async def stranger(endpoint: str) -> AsyncIterator[zmq.asyncio.Socket]:
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.connect(endpoint)
    yield socket
    socket.close()


async def test_bad_frames_are_dropped_and_counted(
    router: Router, dealer: Dealer, stranger: zmq.asyncio.Socket
) -> None:
    await stranger.send_multipart([b"HTTP/1.1", b"GET", b"/"])
    await stranger.send_multipart([b"XDS1", b"M", b'{"type":"Goodbye"}'])
    await stranger.send_multipart([b"XDS1", b"M", b"{}"])
    await stranger.send_multipart(sockets.codec.to_frames(ASK))  # one peer's frames arrive in order
    assert (await router.recv())[1] == ASK
    assert router.num_refused == 3
    await send(dealer, ASK)
    assert await router.recv() == (b"expert-0.1", ASK)
    router.send(b"expert-0.1", ASK)  # not what a dealer expects
    router.send(b"expert-0.1", ANSWER)
    assert await dealer.recv() == ANSWER
    assert dealer.num_refused == 1


async def test_an_oversized_frame_never_arrives(
    router: Router, dealer: Dealer, stranger: zmq.asyncio.Socket
) -> None:
    await stranger.send_multipart([b"XDS1", b"M", b" " * (sockets._FRAME_BYTES_MAX + 1)])
    await send(dealer, ASK)
    assert await router.recv() == (b"expert-0.1", ASK)
    assert router.num_refused == 0


async def test_an_oversized_message_is_refused_before_it_leaves(router: Router, dealer: Dealer) -> None:
    with pytest.raises(ProtocolError, match="GetStatus: body of"):
        dealer.send(messages.GetStatus(request_id="x" * (sockets.codec.BODY_BYTES_MAX)))


async def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot serve ipc://"):
        Router(f"ipc://{tmp_path}/missing/r.sock", messages.GetStatus)


async def test_a_dealer_finds_the_next_server(endpoint: str, dealer: Dealer) -> None:
    for _ in range(2):
        router = Router(endpoint, messages.GetStatus)
        await send(dealer, ASK)
        assert (await router.recv())[0] == b"expert-0.1"
        router.close()
        await async_eventually(lambda: not dealer.send(ASK), timeout_s=5, what="disconnected")


async def test_request_drops_late_answers(router: Router, dealer: Dealer) -> None:
    async def serve() -> None:
        peer, _ = await router.recv()
        router.send(peer, messages.Status(request_id="0", pod_map=ANSWER.pod_map))
        router.send(peer, ANSWER)

    server = asyncio.create_task(serve())
    assert await rpc.request(dealer, ASK, messages.Status, Deadline.after_ms(5000)) == ANSWER
    await server


async def test_request_gives_up_at_its_deadline(router: Router, dealer: Dealer) -> None:
    with pytest.raises(RequestTimeout, match=r"r.sock did not answer GetStatus in time"):
        await rpc.request(dealer, ASK, messages.Status, Deadline.after_ms(80))


async def test_a_thread_without_a_loop(router: Router, endpoint: str) -> None:
    def hot_loop() -> messages.Message | None:
        dealer = SyncDealer(endpoint, b"attention-0.1", messages.Status)
        try:
            assert dealer.recv(timeout_ms=1) is None
            assert dealer.send(ASK, timeout_ms=5000)
            return dealer.recv(timeout_ms=5000)
        finally:
            dealer.close()

    thread = asyncio.create_task(asyncio.to_thread(hot_loop))
    peer, message = await router.recv()
    assert (peer, message) == (b"attention-0.1", ASK)
    router.send(peer, ANSWER)
    assert await thread == ANSWER


def test_a_thread_without_a_server(endpoint: str) -> None:
    dealer = SyncDealer(endpoint, b"", messages.Status)
    assert not dealer.send(ASK)
    assert not dealer.send(ASK, timeout_ms=10)
    dealer.close()
