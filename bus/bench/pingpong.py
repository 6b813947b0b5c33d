"""The ping-pong that all ways play, and the protocol of a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from time import monotonic_ns
from typing import Any, Protocol, runtime_checkable

import numpy as np

REWRITTEN_BYTES_MIN = 16 * 1024  # below it the tight loop, whose rounds follow one another, is what matters
HANDED_OVER = "handed over"  # how the names of the ways end that rewrite nothing at any size
MARK_MAX = 127


@dataclass(slots=True)
class Ends:
    """How this side sends and receives messages of one size.

    The arguments are apart, so that the loop calls the transport's own function and nothing of ours in between.
    `rewrite` makes the payload of the next round anew, out of the time, as whoever sends an array has just computed it;
    an array that never changes stays in the caches of both sides, and flatters ways that copy it less. `meet` then
    brings both sides together again, awake; by default it is a ping-pong of a byte. None: the payload is handed over as
    it is, round after round in the tight loop; the first and the last byte carry the number of the message, which
    whoever receives it checks.
    """

    send: Callable[..., Any]
    send_arguments: tuple[Any, ...]
    recv: Callable[..., Any]
    recv_arguments: tuple[Any, ...]
    rewrite: Callable[[], Any] | None
    meet: Callable[[], Any] | None = None


class Link(Protocol):
    """A pair's connection under one way. Payloads below `REWRITTEN_BYTES_MIN` need no rewriting."""

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
    if ends.rewrite is None or (ends.meet is None and num_bytes < REWRITTEN_BYTES_MIN):
        return _play(ends, side, rounds)
    return _play_rewriting(ends, ends.rewrite, ends.meet or meeting(link, side), side, rounds)


def meeting(link: Link, side: int) -> Callable[[], None]:
    """Return a call after which both sides have left it within a microsecond or so."""
    ends = link.ends(1)
    send, out, recv, into = ends.send, ends.send_arguments, ends.recv, ends.recv_arguments

    def meet() -> None:
        if side == 0:
            send(*out)
            recv(*into)
        else:
            recv(*into)
            send(*out)

    return meet


def marks() -> Iterator[int]:
    """Yield the marks of the messages of one direction, in order: both sides count."""
    return cycle(range(1, MARK_MAX + 1))


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


def _play_rewriting(
    ends: Ends, rewrite: Callable[[], Any], meet: Callable[[], Any], side: int, rounds: int
) -> list[int]:
    send, out, recv, into = ends.send, ends.send_arguments, ends.recv, ends.recv_arguments
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
