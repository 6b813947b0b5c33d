"""Section p2p: ping-pong of one pair, and the CPU time of a sleeping waiter."""

from __future__ import annotations

from collections import defaultdict

from bus.bench.pairs import Samples, calibrate, open_pairs, play, record
from bus.bench.peers.ours import LIMIT, SPIN
from bus.bench.pingpong import HANDED_OVER
from bus.bench.session import OURS, Record, Session
from bus.bench.stats import figures, median_ratio

SECTION = "p2p"
ONE_PAIR, IDLE = "one pair", "sleeping waiter"
BLOCKS = 4  # of our own ways and the limit in a turn: a few milliseconds each
IDLE_SECONDS = 0.4


def run(session: Session) -> None:
    """Measure the section."""
    with session.open(SECTION, [OURS, *session.plan.peers], 2):
        ways = open_pairs(session, SECTION, max(session.plan.sizes), pinned=True)
        _measure_one_pair(session, ways)
        _measure_idle(session, ways)


def _measure_one_pair(session: Session, ways: dict[str, list[str]]) -> None:
    samples: Samples = defaultdict(list)
    blocks: Samples = defaultdict(list)
    counts: dict[tuple[str, int], list[int]] = {}
    for turn in range(session.plan.rounds):
        for size in session.plan.sizes:
            session.say(f"{SECTION}: {ONE_PAIR}, round {turn + 1} of {session.plan.rounds}, {size} bytes")
            for name in list(session.groups):
                parts = BLOCKS if name == OURS else 1
                if (name, size) not in counts:
                    counts[name, size] = calibrate(session, SECTION, name, ways[name], size, parts)
                found = play(session, SECTION, name, ways[name], size, counts[name, size], parts)
                for way, rounds in found.items():
                    samples[way, size].append([ns for block in rounds for ns in block])
                    blocks[way, size] += rounds
    to_limit = {
        (way, size): {"to_limit": median_ratio(rounds, blocks[LIMIT, size])}
        for (way, size), rounds in blocks.items()
        if way.startswith(OURS) and (LIMIT, size) in blocks
    }
    record(session, SECTION, ONE_PAIR, samples, to_limit)


def _measure_idle(session: Session, ways: dict[str, list[str]]) -> None:
    session.say(f"{SECTION}: {IDLE}")
    for name in list(session.groups):
        for way in ways[name]:
            if way in (LIMIT, SPIN) or way.endswith(HANDED_OVER):
                continue
            answers = session.ask(SECTION, name, what="idle", way=way, seconds=IDLE_SECONDS)
            if answers is None:
                break
            cpu_ns, wall_ns = answers[1]
            extra = {"cpu_percent": 100 * cpu_ns / wall_ns}
            session.records.append(Record(SECTION, way, {"scenario": IDLE}, figures([[wall_ns]]), extra))
