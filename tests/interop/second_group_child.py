"""A rank of a group that speaks the second implementation: `python -m tests.interop.second_group_child ROLE JSON`.

Roles: dispatch, alltoall. Prints {"segment": ...}, then obeys the JSON lines on stdin and answers each with a line:
what came, or {"error": name}. The first line names the segments of all ranks; an empty one ends the process. Rows and
pieces are hexadecimal.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from typing import Any

from tests.interop.second import BusError, Segment
from tests.interop.second_alltoall import AllToAll, areas
from tests.interop.second_dispatch import Arrived, Exchange, Shape
from tests.interop.second_rows import Int8Row, Row, rounded


def say(**fields: object) -> None:
    """Print one finding."""
    print(json.dumps(fields), flush=True)


def product(arrived: Arrived, expert: int) -> Row | Int8Row:
    """Do an expert's work, as tests/harness/dispatch_world.py does it."""
    row = arrived.row
    if isinstance(row, Int8Row):
        return Int8Row(row.q[::-1], rounded(rounded(row.scale * (expert + 1)) / 3))
    third = rounded(expert / 3)
    return array("f", [rounded(v * (expert + 1)) + third for v in row])


class Dispatching:
    """Obeys `dispatch` (its rows and experts), `combine` (weights), `exchange` (both), `give_up`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._shape = Shape(**config["shape"])
        self._takes_int8, self._rank = config["takes_int8"], config["rank"]
        self.areas = self._shape.areas()
        self._arrived: dict[int, list[Arrived]] = {}

    def join(self, segments: list[Segment]) -> None:
        """Meet the other ranks."""
        self._end = Exchange(segments, self._shape, self._rank, takes_int8=self._takes_int8)

    def obey(self, order: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Do one thing; return what came."""
        event, what = order["event"], order["do"]
        if what == "give_up":
            self._end.give_up(event >> 16 & 0xF)
        if what in ("dispatch", "exchange"):
            rows = [array("f", bytes.fromhex(row)) for row in order["rows"]]
            self._arrived[event] = self._end.dispatch(rows, order["experts"], event, deadline_s)
        if what in ("combine", "exchange"):
            first = self._rank * self._shape.num_local_experts
            results = [product(a, first + a.expert) for a in self._arrived.pop(event)]
            sums = self._end.combine(results, order["weights"], event, deadline_s)
            return {"sums": [row.tobytes().hex() for row in sums]}
        return {}


class Swapping:
    """Obeys `exchange` (pieces: hex, or [offset, hex] in the app area; bytes of a row), `give_up`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.areas = areas(config["num_ranks"], config["half_bytes"], config["app_bytes"])
        self._rank = config["rank"]

    def join(self, segments: list[Segment]) -> None:
        """Meet the other ranks."""
        self._end = AllToAll(segments, self._rank)

    def obey(self, order: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Do one thing; return what came."""
        if order["do"] == "give_up":
            self._end.give_up()
            return {}
        pieces = [self._piece(given) for given in order["pieces"]]
        found = self._end.exchange(pieces, order["row_bytes"], order["event"], deadline_s)
        return {"pieces": [piece.hex() for piece in found]}

    def _piece(self, given: str | list[Any]) -> bytes | tuple[int, int]:
        if isinstance(given, str):
            return bytes.fromhex(given)
        offset, data = given[0], bytes.fromhex(given[1])
        self._end.area(offset, len(data))[:] = data
        return offset, len(data)


def main() -> None:
    """Obey until the end."""
    role, config = sys.argv[1], json.loads(sys.argv[2])
    side: Dispatching | Swapping = {"dispatch": Dispatching, "alltoall": Swapping}[role](config)
    incarnation, rank = config["incarnation"], config["rank"]
    own = Segment.create(
        config["name"], side.areas, service="expert", index=rank, incarnation=incarnation, num_lanes=1
    )
    say(segment=own.name)
    names: list[str] = json.loads(sys.stdin.readline())["segments"]
    side.join([own if name == own.name else Segment.attach(name) for name in names])
    while order := sys.stdin.readline().strip():
        given = json.loads(order)
        try:
            say(**side.obey(given, time.monotonic() + given["seconds"]))
        except BusError as error:
            say(error=error.name, text=str(error))
    own.close()
    say(imported=sorted({name.split(".")[0] for name in sys.modules} & {"bus", "numpy"}))


if __name__ == "__main__":
    main()
