"""One of a crowd on few cores: `crowd_child.py ROLE POD INDEX`. Pairs play ping-pong until told to stop.

Prints `ready SEGMENT`, then after `go PARTNER_SEGMENT` plays; at the end prints `played ROUNDS SLEEPS`. Rounds are
also in the app area's first word, moves to another core in its third, for the starter to look at. Roles name the
way to wait.
"""

from __future__ import annotations

import sys

import numpy as np

from bus.clock import Deadline
from bus.config import XcclConfig
from bus.memory import _native
from bus.memory.ring import RingLayout
from bus.memory.wait import Adaptive, Blocking
from bus.xccl.endpoint import Endpoint, World
from bus.xccl.p2p import P2p

NUM_PROCESSES = 12
WORLD = World.of(attention=NUM_PROCESSES, expert=1)
STOP = 1  # in the second word of the app area
DEADLINE_MS = 60_000
STRATEGIES = {"adaptive": lambda: Adaptive(20_000), "blocking": Blocking}


def play(p2p: P2p, endpoint: Endpoint, index: int) -> int:
    """Even ones serve; a message holds its round, so that a stale or torn one shows. Returns the rounds."""
    partner, base = WORLD.ranks[index ^ 1], endpoint.segment.layout.app_offset
    deadline, message, rounds = Deadline.after_ms(DEADLINE_MS), np.zeros(8, np.uint64), 0
    buf = endpoint.segment.buf
    while True:
        if index % 2 == 0:
            stopping = _native.load_u64(buf, base + 8) == STOP
            message[:] = 0 if stopping else rounds + 1
            p2p.send(message, partner, rounds, deadline)
            if stopping:
                return rounds
            p2p.recv(message, partner, rounds, deadline)
        else:
            p2p.recv(message, partner, rounds, deadline)
            if message[0] == 0:
                return rounds
            p2p.send(message, partner, rounds, deadline)
        rounds += 1
        assert (message == rounds).all(), message
        _native.store_u64(buf, base, rounds)
        _native.store_u64(buf, base + 16, p2p.sender(partner).num_moves + p2p.receiver(partner).num_moves)


def main(role: str, pod: str, index: int) -> None:
    partner = WORLD.ranks[index ^ 1]
    endpoint = Endpoint(
        pod=pod,
        world=WORLD,
        me=WORLD.ranks[index],
        incarnation=1,
        config=XcclConfig(),
        p2p_peers=[partner],
        p2p_ring=RingLayout(num_slots=4, slot_bytes=128),
        app_bytes=4096,
        strategy=STRATEGIES[role](),
    )
    print("ready", endpoint.segment.name, flush=True)
    endpoint.learn(partner, 1, sys.stdin.readline().split()[1])
    p2p = P2p(endpoint)
    rounds = play(p2p, endpoint, index)
    sleeps = p2p.sender(partner).num_sleeps + p2p.receiver(partner).num_sleeps
    print("played", rounds, sleeps, flush=True)
    sys.stdin.readline()  # the partner may still be reading
    p2p.close()
    endpoint.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
