"""isend, irecv and probe: messages that are under way while their thread does something else."""

from __future__ import annotations

import numpy as np
import pytest

from bus.clock import Deadline
from bus.errors import EventMismatch, PeerDied, PeerStalled, Truncated
from bus.xccl.handle import SendHandle
from tests.harness.p2p_sides import A, B, Side, soon, together, two_sides


def test_handles_pipeline_messages_in_one_thread(sides: tuple[Side, Side]) -> None:
    a, b = sides
    arrays = [np.full(size, i) for i, size in enumerate([1, 3, 500, 2, 0])]
    sends = [a.p2p.isend(array, B, i) for i, array in enumerate(arrays)]
    recvs = [b.p2p.irecv(None, A, i) for i in range(len(arrays))]
    assert not sends[2].test()
    deadline = soon()
    while sum(handle.test() for handle in (*sends, *recvs)) < 2 * len(arrays):
        assert not deadline.expired()
    assert all(np.array_equal(handle.array, array) for handle, array in zip(recvs, arrays, strict=True))
    assert all(handle.test() for handle in sends)
    sends[0].wait(soon())


def test_send_comes_after_the_isends_before_it(sides: tuple[Side, Side]) -> None:
    a, b = sides
    handle = a.p2p.isend(np.arange(1000), B, 1)
    got = together(
        lambda: a.p2p.send(np.arange(3), B, 2, soon()),
        lambda: (b.p2p.recv(None, A, 1, soon()), b.p2p.recv(None, A, 2, soon())),
    )
    assert [len(array) for array in got] == [1000, 3]
    assert handle.test()


def test_a_cancelled_isend_is_never_delivered(sides: tuple[Side, Side]) -> None:
    a, b = sides
    big, small = a.p2p.isend(np.arange(1000), B, 1), a.p2p.isend(np.arange(3), B, 2)
    assert big.cancel()
    assert not big.cancel()
    with pytest.raises(PeerStalled, match="cancelled"):
        big.test()
    # The receiver cannot know that the rest will never come, until the next message does.
    assert together(lambda: small.push(soon()), lambda: b.p2p.discard(A, soon())) == 1
    recv = b.p2p.irecv(None, A, 2)
    while not (recv.test() and small.test()):
        pass
    assert not small.cancel()
    assert recv.array is not None
    assert np.array_equal(recv.array, np.arange(3))


def test_isend_waits_for_its_grant_in_wait_only(pod: str) -> None:
    a, b = two_sides(pod)
    handle = a.p2p.isend(np.arange(3), B, 1)
    assert not handle.test()
    with pytest.raises(PeerStalled, match="granted"):
        handle.wait(Deadline.after_ms(20))
    together(lambda: handle.wait(soon()), lambda: b.p2p.recv(None, A, 1, soon()))
    a.close()
    b.close()


def test_an_irecv_refuses_like_recv_and_goes_on(sides: tuple[Side, Side]) -> None:
    a, b = sides
    sent = a.p2p.isend(np.arange(4), B, 5)
    wrong = b.p2p.irecv(None, A, 6)
    with pytest.raises(EventMismatch):
        wrong.test()
    with pytest.raises(RuntimeError, match="pending"):
        b.p2p.recv(None, A, 5, soon())
    assert wrong.cancel()
    with pytest.raises(PeerStalled, match="cancelled"):
        wrong.test()
    short = b.p2p.irecv(np.zeros(1), A, 5)
    with pytest.raises(Truncated):
        short.test()
    assert short.cancel()
    assert len(b.p2p.irecv(None, A, 5).wait(soon())) == 4
    sent.wait(soon())
    with pytest.raises(PeerStalled, match="nothing arrived"):
        b.p2p.irecv(None, A, 7).wait(Deadline.after_ms(20))


def test_handles_of_a_dead_peer_fail(sides: tuple[Side, Side]) -> None:
    a, b = sides
    sent, received = a.p2p.isend(np.arange(4), B, 5), a.p2p.irecv(None, B, 1)
    assert not received.test()
    b.endpoint.close()
    with pytest.raises(PeerDied):
        sent.wait(soon())
    with pytest.raises(PeerDied):
        received.wait(soon())


def test_a_handle_does_not_outlive_the_incarnation_it_went_to(sides: tuple[Side, Side], pod: str) -> None:
    a, b = sides
    pushed, queued = a.p2p.isend(np.arange(4), B, 1), a.p2p.isend(np.arange(1000), B, 2)
    assert not pushed.test()
    b.endpoint.close()
    again = Side(pod, B, incarnation=2)
    a.learn(again)
    again.learn(a)
    with pytest.raises(RuntimeError, match="under way"):
        a.p2p.sender(B).send(np.arange(2), 3, soon())
    for handle in (pushed, queued):
        with pytest.raises(PeerDied):
            handle.wait(soon())
    assert not queued.cancel()
    got = together(lambda: a.p2p.send(np.arange(3), B, 3, soon()), lambda: again.p2p.recv(None, A, 3, soon()))
    assert len(got) == 3
    with pytest.raises(PeerDied, match="replaced"):
        pushed.test()
    again.close()


def give_up_half_way(a: Side, b: Side) -> SendHandle:
    """Let `b` take the beginning of a message and skip the rest; return the sender's handle, which does not know."""
    sent = a.p2p.isend(np.arange(200), B, 1)  # needs more slots than the ring has
    half = b.p2p.irecv(None, A, 1)
    assert not half.test()
    assert half.cancel()
    while a.p2p.sender(B).queue:
        assert not sent.test()
        b.p2p.probe(A)  # skips what is left over
    return sent


def test_a_message_whose_receiver_gave_up_fails_even_after_a_later_one_was_taken(
    sides: tuple[Side, Side],
) -> None:
    a, b = sides
    first = give_up_half_way(a, b)
    second = a.p2p.isend(np.arange(2), B, 2)
    assert len(b.p2p.recv(None, A, 2, soon())) == 2
    with pytest.raises(PeerStalled, match="gave the message up"):
        first.test()
    assert second.test()


def test_nor_does_a_send_that_returned_make_it_look_taken(sides: tuple[Side, Side]) -> None:
    a, b = sides
    first = give_up_half_way(a, b)
    together(lambda: a.p2p.send(np.arange(2), B, 2, soon()), lambda: b.p2p.recv(None, A, 2, soon()))
    with pytest.raises(PeerStalled, match="gave the message up"):
        first.test()
    third = a.p2p.isend(np.arange(3), B, 3)  # what was given up before it began does not concern it
    fourth = a.p2p.isend(np.arange(4), B, 4)
    assert [len(b.p2p.recv(None, A, event, soon())) for event in (3, 4)] == [3, 4]
    assert third.test()
    assert fourth.test()


def test_probe_tells_what_comes_and_takes_nothing(sides: tuple[Side, Side]) -> None:
    a, b = sides
    assert b.p2p.probe(A) is None
    sent = a.p2p.isend(np.zeros((2, 3), np.int16), B, 77)
    for _ in range(2):
        found = b.p2p.probe(A)
        assert found is not None
        assert (found[0], found[1].dtype, found[1].shape) == (77, np.int16, (2, 3))
    b.p2p.recv(None, A, 77, soon())
    sent.wait(soon())
