"""The ping-pong that all ways play, and the protocol of a pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any, Protocol, runtime_checkable

import numpy as np

Times = tuple[
    list[int], list[int]
]  # per round, ns: duration, and how much of it went into rewriting the payload


@dataclass(slots=True)
class Ends:
    """How this side sends and receives messages of one size.

    The arguments are apart, so that the loop calls the transport's own function and nothing of ours in between.
    `rewrite`, if any, makes the next payload anew, out of the time: it keeps caches from flattering zero-copy ways.
    """

    send: Callable[..., Any]
    send_arguments: tuple[Any, ...]
    recv: Callable[..., Any]
    recv_arguments: tuple[Any, ...]
    rewrite: Callable[[], Any] | None = None


class Link(Protocol):
    """A pair's connection under one way."""

    def ends(self, num_bytes: int) -> Ends:
        """Return how messages of `num_bytes` go."""


@runtime_checkable
class OwnLoop(Link, Protocol):
    """A way that plays its rounds itself: the limit, in C."""

    def play(self, side: int, num_bytes: int, rounds: int) -> Times:
        """See `play`."""


def play(link: Link | OwnLoop, side: int, num_bytes: int, rounds: int) -> Times:
    """Play `rounds` of there and back; side 0 begins. The durations are those of side 0's rounds, ns."""
    if isinstance(link, OwnLoop):
        return link.play(side, num_bytes, rounds)
    ends = link.ends(num_bytes)
    return _play_rewriting(ends, side, rounds) if ends.rewrite else _play(ends, side, rounds)


def _play(ends: Ends, side: int, rounds: int) -> Times:
    send, out, recv, into = ends.send, ends.send_arguments, ends.recv, ends.recv_arguments
    stamps = [monotonic_ns()]
    note = stamps.append
    if side == 0:
        for _ in range(rounds):
            send(*out)
            recv(*into)
            note(monotonic_ns())
    else:
        for _ in range(rounds):
            recv(*into)
            send(*out)
            note(monotonic_ns())
    return np.diff(stamps).tolist(), []


def _play_rewriting(ends: Ends, side: int, rounds: int) -> Times:
    send, out, recv, into, rewrite = (
        ends.send,
        ends.send_arguments,
        ends.recv,
        ends.recv_arguments,
        ends.rewrite,
    )
    assert rewrite is not None
    durations, excluded = [], []
    for _ in range(rounds):
        begin = monotonic_ns()
        if side == 1:
            recv(*into)
        before = monotonic_ns()
        rewrite()
        excluded.append(monotonic_ns() - before)
        send(*out)
        if side == 0:
            recv(*into)
        durations.append(monotonic_ns() - begin)
    return durations, excluded
