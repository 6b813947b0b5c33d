"""Section crowd: four pairs at once, 64 bytes, alone and beside busy processes at two nice values.

Ours is there twice, in processes of their own: as it is, and with the setting that belongs beside work at the pod's own
nice value, `xccl.nice` (`bus/README.md`, "More processes than cores").
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext

from bus.bench.busy import busy
from bus.bench.launch import OURS_NICE, WAYS
from bus.bench.pairs import Samples, calibrate, open_pairs, play, record
from bus.bench.peers.ours import ADAPTIVE, BLOCKING
from bus.bench.pingpong import HANDED_OVER
from bus.bench.session import OURS, Absence, Session

SECTION = "crowd"
FOUR_PAIRS = "4 pairs"
ADAPTIVE_NICE = f"{ADAPTIVE}, nice {WAYS[OURS_NICE].nice}"
SIZE, NUM_RANKS = 64, 8
WAYS_OF_OURS = {OURS: [ADAPTIVE, BLOCKING], OURS_NICE: [ADAPTIVE]}


def run(session: Session) -> None:
    """Measure the section."""
    own = [OURS] if session.plan.xccl.nice else [OURS, OURS_NICE]  # a run with the setting has it in all rows
    with session.open(SECTION, [*own, *session.plan.peers], NUM_RANKS):
        ways = open_pairs(session, SECTION, SIZE, pinned=False)
        ways |= {name: some for name, some in WAYS_OF_OURS.items() if name in ways}
        ways = {name: [way for way in some if not way.endswith(HANDED_OVER)] for name, some in ways.items()}
        count = session.plan.busy_processes
        for nice in (None, 19, 0):
            text = (
                FOUR_PAIRS if nice is None else f"{FOUR_PAIRS} beside {count} busy processes at nice {nice}"
            )
            try:
                with nullcontext() if nice is None else busy(count, nice):
                    _measure(session, ways, text)
            except PermissionError as error:
                session.note(Absence(SECTION, text, False, str(error)))


def _measure(session: Session, ways: dict[str, list[str]], scenario: str) -> None:
    samples: Samples = defaultdict(list)
    counts: dict[str, list[int]] = {}
    for turn in range(session.plan.rounds):
        session.say(f"{SECTION}: {scenario}, round {turn + 1} of {session.plan.rounds}")
        for name in list(session.groups):
            if name not in counts:
                counts[name] = calibrate(session, SECTION, name, ways[name], SIZE, 1)
            found = play(session, SECTION, name, ways[name], SIZE, counts[name], 1)
            for way, rounds in found.items():
                shown = ADAPTIVE_NICE if name == OURS_NICE else way
                samples[shown, SIZE].append([ns for block in rounds for ns in block])
    record(session, SECTION, scenario, samples, {})
