"""The ping-pong that all ways play, and the protocol of a pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclass(slots=True)
class Ends:
    """How this side sends and receives messages of one size.

    The arguments are apart, so that the loop calls the transport's own function and nothing of ours in between.
    `rewrite`, if any, makes the payload of the next round anew, out of the time, so that caches do not flatter ways
    that do not copy it; `meet` then brings both sides together again, awake.
    """

    send: Callable[..., Any]
    send_arguments: tuple[Any, ...]
    recv: Callable[..., Any]
    recv_arguments: tuple[Any, ...]
    rewrite: Callable[[], Any] | None = None
    meet: Callable[[], Any] | None = None


class Link(Protocol):
    """A pair's connection under one way."""

    def ends(self, num_bytes: int) -> Ends:
        """Return how messages of `num_bytes` go."""


@runtime_checkable
class OwnLoop(Link, Protocol):
    """A way that plays its rounds itself: the limit, in C."""

    def play(self, side: int, num_bytes: int, rounds: int) -> list[int]:
        """See `play`."""


def play(link: Link | OwnLoop, side: int, num_bytes: int, rounds: int) -> list[int]:
    """Play `rounds` of there and back; side 0 begins. Returns how long each took at this side, ns."""
    if isinstance(link, OwnLoop):
        return link.play(side, num_bytes, rounds)
    ends = link.ends(num_bytes)
    return _play_rewriting(ends, side, rounds) if ends.rewrite else _play(ends, side, rounds)


def _play(ends: Ends, side: int, rounds: int) -> list[int]:
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
    return [int(value) for value in np.diff(stamps)]


def _play_rewriting(ends: Ends, side: int, rounds: int) -> list[int]:
    send, out, recv, into = ends.send, ends.send_arguments, ends.recv, ends.recv_arguments
    rewrite, meet = ends.rewrite, ends.meet
    assert rewrite is not None and meet is not None
    durations = []
    for _ in range(rounds):
        rewrite()
        meet()
        begin = monotonic_ns()
        if side == 0:
            send(*out)
            recv(*into)
        else:
            recv(*into)
            send(*out)
        durations.append(monotonic_ns() - begin)
    return durations
