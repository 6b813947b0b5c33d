"""What KV transfer means, without shared memory or cells: the slow twin that `KvSource` and `KvSink` must equal.

A block is one value. Work is counted in blocks. Every name means what it means there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class SlowSource:
    """Blocks, the offers that stand, and those that have ended and were not reported yet."""

    blocks: list[int]
    standing: dict[int, list[int]] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    blocks_sent: int = 0
    # What sinks said and nobody has looked at yet: serial -> sink -> blocks taken, the last time that it fetched.
    answered: dict[int, dict[int, int]] = field(default_factory=dict)
    last_serial: int = 0

    def offer(self, block_ids: list[int]) -> int:
        """Return the serial."""
        self.last_serial += 1
        self.standing[self.last_serial] = block_ids
        return self.last_serial

    def withdraw(self, serials: list[int]) -> None:
        """End them, as fetched where a sink has said so."""
        for serial in serials:
            if self.standing.pop(serial, None) is not None:
                said = self.answered.pop(serial, {})
                self.blocks_sent += said[min(said)] if said else 0  # the first sink's word counts
                self.ended.append(serial)

    def take_ended(self) -> list[int]:
        """Return the serials that ended since the last call."""
        self.withdraw([serial for serial in self.answered if serial in self.standing])
        self.answered.clear()
        ended, self.ended = self.ended, []
        return ended


@dataclass(slots=True)
class SlowFetch:
    """Values go from `source_ids` to `own_ids`; those before `position` have gone."""

    fetch_id: int
    source: SlowSource
    serial: int
    source_ids: list[int]
    own_ids: list[int]
    position: int = 0


class SlowSink:
    """Fetches from any sources, one block at a time; sources take turns."""

    def __init__(self, num_blocks: int, index: int) -> None:
        self.blocks, self.index = [0] * num_blocks, index
        self.completions: list[tuple[int, bool]] = []  # fetch id, whether all of it has arrived
        self._turns: deque[list[SlowFetch]] = deque()  # of one source each, in the order of their posts

    def post(self, fetch: SlowFetch) -> None:
        """Begin, unless its offer has ended."""
        if fetch.serial not in fetch.source.standing:
            self.completions.append((fetch.fetch_id, False))
            return
        for fetches in self._turns:
            if fetches[0].source is fetch.source:
                fetches.append(fetch)
                return
        self._turns.append([fetch])

    def cancel(self, fetch_id: int) -> None:
        """End it at once."""
        for fetches in tuple(self._turns):
            for fetch in tuple(fetches):
                if fetch.fetch_id == fetch_id:
                    fetches.remove(fetch)
                    self.completions.append((fetch_id, False))
            if not fetches:
                self._turns.remove(fetches)

    def progress(self, blocks_max: int) -> bool:
        """Move up to so many blocks; tell whether work is left."""
        while self._turns and blocks_max > 0:
            fetches = self._turns.popleft()
            blocks_max -= self._advance(fetches, fetches[0], blocks_max)
            if fetches:
                self._turns.append(fetches)
        return bool(self._turns)

    def _advance(self, fetches: list[SlowFetch], fetch: SlowFetch, blocks_max: int) -> int:
        if fetch.serial not in fetch.source.standing:
            fetches.remove(fetch)
            self.completions.append((fetch.fetch_id, False))
            return 0
        count = min(blocks_max, len(fetch.own_ids) - fetch.position)
        for _ in range(count):
            value = fetch.source.blocks[fetch.source_ids[fetch.position]]
            self.blocks[fetch.own_ids[fetch.position]] = value
            fetch.position += 1
        if fetch.position == len(fetch.own_ids):
            fetches.remove(fetch)
            fetch.source.answered.setdefault(fetch.serial, {})[self.index] = len(fetch.own_ids)
            self.completions.append((fetch.fetch_id, True))
        return count

    def take_completions(self) -> list[tuple[int, bool]]:
        """Return the fetches that ended since the last call."""
        done, self.completions = self.completions, []
        return done
