"""Section thresholds: the sizes at which point-to-point changes its path, and what each choice loses.

Around each threshold neighbouring sizes are played by the path below it and by the path from it on (bus/bench/peers/
ours_paths.py), block by block in turn, in one process pair. The array is written anew before each message at every
size, so that the sizes compare; large ones come first, since an end that has learned that sharing a copy loses leaves
it out for long. What the setting chooses is compared with the other path within the same milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from bus.bench.launch import OURS_PATHS
from bus.bench.pairs import calibrate, open_pairs, play
from bus.bench.session import Record, Session
from bus.bench.stats import figures, median_ratio
from bus.xccl.p2p import PULL_BYTES_MIN, READ_BYTES_MIN, SHARED_BYTES_MIN

SECTION = "thresholds"
BLOCKS = 8  # of each path in a turn
LANES_BYTES_MIN = 512 * 1024  # 2 * LANE_BLOCK_BYTES of bus/memory/_native_link.h
FACTORS = tuple(Fraction(n, 4) for n in (1, 2, 3, 4, 6, 8, 16))
FROM_IT_ON = tuple(factor for factor in FACTORS if factor >= 1)


@dataclass(frozen=True, slots=True)
class Threshold:
    """`below` and `above` are names of paths; sizes are `factors` times the setting, `num_bytes`."""

    name: str
    num_bytes: int
    below: str
    above: str
    factors: tuple[Fraction, ...] = FACTORS

    @property
    def sizes(self) -> list[int]:
        """Bytes of the messages that are played."""
        return [int(self.num_bytes * factor) for factor in self.factors]

    def chosen(self, size: int) -> str:
        """Return the path of a message of `size`."""
        return self.above if size >= self.num_bytes else self.below


THRESHOLDS = (
    Threshold("read_bytes_min", READ_BYTES_MIN, "ring", "read"),
    Threshold("pull_bytes_min", PULL_BYTES_MIN, "app: ring", "app: pull"),
    Threshold("shared_bytes_min, read", SHARED_BYTES_MIN, "read", "read, shared"),
    Threshold("shared_bytes_min x 1.5, pulled", SHARED_BYTES_MIN * 3 // 2, "app: pull", "app: pull, shared"),
    # Below it the blocks are too few for several lanes: there is nothing to force.
    Threshold("num_lanes = 2", LANES_BYTES_MIN, "isend: pull", "isend: pull in lanes", FROM_IT_ON),
)


def run(session: Session) -> None:
    """Measure the section."""
    with session.open(SECTION, [OURS_PATHS], 2):
        size_max = max(max(threshold.sizes) for threshold in THRESHOLDS)
        if OURS_PATHS in open_pairs(session, SECTION, size_max, pinned=True):
            for threshold in THRESHOLDS:
                _measure(session, threshold)


def _measure(session: Session, threshold: Threshold) -> None:
    session.say(f"{SECTION}: {threshold.name}, {threshold.below} or {threshold.above}")
    ways = [threshold.below, threshold.above]
    for size in sorted(threshold.sizes, reverse=True):
        counts = calibrate(session, SECTION, OURS_PATHS, ways, size, BLOCKS)
        blocks: dict[str, list[list[float]]] = {way: [] for way in ways}
        for _ in range(session.plan.rounds):
            for way, found in play(session, SECTION, OURS_PATHS, ways, size, counts, BLOCKS).items():
                blocks[way] += found
        if not all(blocks.values()):
            return  # the group has failed, which is noted
        chosen = threshold.chosen(size)
        [other] = [way for way in ways if way != chosen]
        for way in ways:
            extra = {"setting": float(threshold.num_bytes)}
            if way == chosen:
                extra["to_other"] = median_ratio(blocks[chosen], blocks[other])
            case: dict[str, int | str] = {"threshold": threshold.name, "size": size}
            session.records.append(Record(SECTION, way, case, figures(blocks[way]), extra))
