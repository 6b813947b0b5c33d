"""The bus itself, and the C ping-pong that it is measured against, in the same process pair.

C limit       two copies in C, pure spin: bus/memory/_native_bench.c
All rewrite their arrays before each round from 16 KiB on; pull and zero-copy always.
spin, adaptive (the default), blocking
              `Sender.send`, `Receiver.recv` on private arrays: two copies; from 16 KiB on one, across processes
pull          adaptive, the array lies in the sender's app area: one copy
zero-copy     adaptive, `reserve`, `commit` and `peek`, `release`: no copy; writing a large array just before has left
              the caches cold
zero-copy, handed over
              the same calls, but the array stays as it is, except for its first and its last byte
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.bench import pingpong
from bus.bench.meeting import Meeting, Message
from bus.bench.peers.ours_rows import open_rows
from bus.bench.pingpong import Ends, Link
from bus.clock import Deadline
from bus.config import XcclConfig
from bus.memory import _native
from bus.memory.layout import align_up
from bus.memory.ring import RingLayout
from bus.memory.wait import Adaptive, Blocking, Spin, WaitStrategy
from bus.priority import prioritise
from bus.xccl.endpoint import Endpoint, Rank, World
from bus.xccl.p2p import P2p

__all__ = ["open_pairs", "open_rows"]

LIMIT, SPIN, ADAPTIVE, BLOCKING, PULL, ZERO_COPY, ZERO_COPY_HANDED_OVER = (
    "C limit",
    "ours spin",
    "ours adaptive",
    "ours blocking",
    "ours pull",
    "ours zero-copy",
    f"ours zero-copy, {pingpong.HANDED_OVER}",
)
TIMEOUT_MS = 120_000
CHUNKED = RingLayout(num_slots=8, slot_bytes=64 * 1024)
EVENT = 1

Bytes = npt.NDArray[np.uint8]
Meet = Callable[[], None]


class Limit:
    """The C ping-pong, in the app area of side 0."""

    def __init__(self, endpoint: Endpoint, peer: Rank, side: int) -> None:
        self._segment = endpoint.segment if side == 0 else endpoint.peer(peer)
        self._played = 0

    def ends(self, num_bytes: int) -> Ends:
        """It has no ends in Python."""
        raise NotImplementedError("the limit plays its own rounds")

    def play(self, side: int, num_bytes: int, rounds: int) -> list[int]:
        """See `bus.bench.pingpong.play`."""
        durations = np.zeros(rounds, np.uint64)
        private = np.ones(num_bytes + 16, np.uint8)[16:]
        segment, timeout_ns = self._segment, TIMEOUT_MS * 1_000_000
        first = self._played + 1
        self._played += 2 * rounds
        offset = segment.layout.app_offset
        is_rewritten = num_bytes >= pingpong.REWRITTEN_BYTES_MIN
        if not _native.bench_pingpong(
            segment.buf, offset, side, private, first, durations, timeout_ns, is_rewritten
        ):
            raise TimeoutError("the other side of the C ping-pong is silent")
        return [int(value) for value in durations]


class Copying:
    """`send` and `recv` on arrays; `own` is in the app area for pulled messages, else private."""

    def __init__(
        self, p2p: P2p, peer: Rank, size_max: int, own: Bytes | None = None, meet: Meet | None = None
    ) -> None:
        self._p2p, self._peer = p2p, peer
        self._sender, self._receiver = p2p.sender(peer), p2p.receiver(peer)
        # 16 bytes past a page, where NumPy likes to put data.
        self._own = np.ones(size_max + 16, np.uint8)[16:] if own is None else own
        self._into = np.ones(size_max + 16, np.uint8)[16:]
        self._meet = meet

    def ends(self, num_bytes: int) -> Ends:
        """See `Link`."""
        deadline, out, into = Deadline.after_ms(TIMEOUT_MS), self._own[:num_bytes], self._into[:num_bytes]
        return Ends(
            self._sender.send,
            (out, EVENT, deadline),
            self._receiver.recv,
            (into, EVENT, deadline),
            lambda: out.fill(7),
            self._meet,
        )


class ZeroCopy:
    """`reserve`, write in place, `commit`; `peek`, look, `release`."""

    def __init__(self, p2p: P2p, peer: Rank, meet: Meet) -> None:
        self._sender, self._receiver, self._meet = p2p.sender(peer), p2p.receiver(peer), meet

    def ends(self, num_bytes: int) -> Ends:
        """See `Link`."""
        sender, receiver = self._sender, self._receiver
        deadline, shape = Deadline.after_ms(TIMEOUT_MS), (num_bytes,)
        count = 0

        def rewrite() -> None:
            nonlocal count
            count = (count + 1) & 127
            sender.reserve(shape, np.uint8, EVENT, deadline).fill(count + 1)

        def send() -> None:
            sender.reserve(shape, np.uint8, EVENT, deadline)  # the same slot again, so that its cost counts
            sender.commit(EVENT)

        def take() -> None:
            message = receiver.peek(EVENT, deadline)
            if not message[0] or message[0] != message[-1]:
                raise AssertionError("another message than was sent")
            receiver.release(EVENT)

        return Ends(send, (), take, (), rewrite, self._meet)


class HandedOver:
    """`reserve`, mark, `commit`; `peek`, check the mark, `release`."""

    def __init__(self, p2p: P2p, peer: Rank) -> None:
        self._sender, self._receiver = p2p.sender(peer), p2p.receiver(peer)

    def ends(self, num_bytes: int) -> Ends:
        """See `Link`."""
        reserve, commit = self._sender.reserve, self._sender.commit
        peek, release = self._receiver.peek, self._receiver.release
        deadline, shape, dtype = Deadline.after_ms(TIMEOUT_MS), (num_bytes,), np.dtype(np.uint8)
        next_sent, next_expected = pingpong.marks().__next__, pingpong.marks().__next__

        def send() -> None:
            array = reserve(shape, dtype, EVENT, deadline)
            array[0] = array[-1] = next_sent()
            commit(EVENT)

        def take() -> None:
            message, mark = peek(EVENT, deadline), next_expected()
            if message.item(0) != mark or message.item(-1) != mark:
                raise AssertionError("another message than was sent")
            release(EVENT)

        return Ends(send, (), take, (), None)


def open_pairs(meeting: Meeting, stack: ExitStack, size_max: int, options: Message) -> dict[str, Link]:
    """Return the links with the partner, one endpoint each."""
    opener = Opener(meeting, stack, XcclConfig(**options["xccl"]))
    prioritise(opener.config.slice_us, opener.config.nice)
    spin_ns = opener.config.spin_us * 1_000
    links: dict[str, Link] = {}
    area = 4096 + 2 * align_up(size_max, 4096)
    endpoint, p2p, peer = opener.open("limit", Adaptive(spin_ns), CHUNKED, area)
    links[LIMIT] = Limit(endpoint, peer, meeting.rank & 1)
    strategies: dict[str, WaitStrategy] = {SPIN: Spin(), ADAPTIVE: Adaptive(spin_ns), BLOCKING: Blocking()}
    for name, strategy in strategies.items():
        _, p2p, peer = opener.open(name.split()[-1], strategy, CHUNKED, 0)
        links[name] = Copying(p2p, peer, size_max)

    def meet() -> None:
        pingpong.meeting(links[ADAPTIVE], meeting.rank & 1)()

    endpoint, p2p, peer = opener.open("pull", Adaptive(spin_ns), CHUNKED, align_up(size_max, 4096))
    own = endpoint.segment.array(endpoint.segment.layout.app_offset, (size_max,), np.uint8)
    links[PULL] = Copying(p2p, peer, size_max, own, meet)
    whole = RingLayout(num_slots=2, slot_bytes=max(4096, size_max))
    _, p2p, peer = opener.open("zero", Adaptive(spin_ns), whole, 0)
    links[ZERO_COPY] = ZeroCopy(p2p, peer, meet)
    links[ZERO_COPY_HANDED_OVER] = HandedOver(p2p, peer)
    return links


class Opener:
    """Makes endpoints that know the partner's."""

    def __init__(self, meeting: Meeting, stack: ExitStack, config: XcclConfig) -> None:
        self._meeting, self._stack, self.config = meeting, stack, config

    def open(
        self, name: str, strategy: WaitStrategy, ring: RingLayout, app_bytes: int, **settings: Any
    ) -> tuple[Endpoint, P2p, Rank]:
        """Return an endpoint of its own, its transport, for which `settings` are, and the partner."""
        world = World.of(attention=self._meeting.num_ranks, expert=0)
        rank = self._meeting.rank
        me, peer = world.ranks[rank], world.ranks[rank ^ 1]
        endpoint: Any = Endpoint(
            pod=f"{self._meeting.name}{name}{abs(self.config.nice)}",  # a run may have groups of either value
            world=world,
            me=me,
            incarnation=1,
            config=self.config,
            p2p_peers=[peer],
            p2p_ring=ring,
            app_bytes=app_bytes,
            strategy=strategy,
        )
        self._stack.callback(endpoint.close)
        names = self._meeting.gather(endpoint.segment.name)
        endpoint.learn(peer, 1, names[rank ^ 1])
        p2p = P2p(endpoint, **settings)
        self._stack.callback(p2p.close)
        p2p.accept(peer)
        return endpoint, p2p, peer
