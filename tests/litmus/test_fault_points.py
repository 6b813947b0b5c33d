"""Every fault point of the C code is one at which a test kills a process.

The tests named here assert, by what the dying process says, that it died at the point; here each point of the source
is looked up among theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from bus.memory import _native
from tests.litmus import test_group_death, test_p2p_death, test_relay_death

MEMORY = Path(_native.__file__).parent
POINT = re.compile(r'^\s*FAULT\("([a-z-]+)"\);', re.MULTILINE)


def names(points: Iterable[str]) -> set[str]:
    return {point.split(":")[0] for point in points}


SENDER, RECEIVER = names(test_p2p_death.SENDER_POINTS), names(test_p2p_death.RECEIVER_POINTS)
DISPATCH, ALLTOALL = names(test_group_death.DISPATCH_POINTS), names(test_group_death.ALLTOALL_POINTS)
ATTENTION = names(test_relay_death.ATTENTION_POINTS)
EXPERT = names(point for point, _ in test_relay_death.OWNER_POINTS)
TRAMPOLINE = names(point for point, _ in test_relay_death.TRAMPOLINE_POINTS)
# C file -> for each kind of process that runs it, the points at which one is killed.
KILLED = {
    "_native.h": [SENDER, RECEIVER, DISPATCH, ALLTOALL, ATTENTION, EXPERT, TRAMPOLINE],
    "_native_link.c": [SENDER, RECEIVER],
    "_native_send.c": [SENDER],
    "_native_recv.c": [RECEIVER],
    "_native_lanes.c": [names(test_p2p_death.LANE_POINTS)],
    "_native_share.c": [names(test_p2p_death.INVITER_POINTS) | names(test_p2p_death.HELPER_POINTS)],
    "_collectives_group.c": [DISPATCH, ALLTOALL],
    "_collectives_dispatch.c": [DISPATCH],
    "_collectives_alltoall.c": [ALLTOALL],
    "_relay.c": [ATTENTION, EXPERT, TRAMPOLINE],
    "_relay_attention_send.c": [ATTENTION],
    "_relay_attention_recv.c": [ATTENTION],
    "_relay_expert.c": [EXPERT, TRAMPOLINE],
    "_relay_forward.c": [TRAMPOLINE],
}


def points_by_file() -> dict[str, list[str]]:
    files = sorted(path for path in MEMORY.glob("*.[ch]") if path.name != "_fault.h")
    found = {path.name: POINT.findall(path.read_text(encoding="utf-8")) for path in files}
    return {name: points for name, points in found.items() if points}


def test_every_fault_point_is_the_end_of_some_process() -> None:
    found = points_by_file()
    assert set(found) == set(KILLED)
    for file, points in found.items():
        assert len(set(points)) == len(points), f"{file}: a name says where a process died"
        for process in KILLED[file]:
            assert set(points) <= process, f"{file}: nobody dies at {sorted(set(points) - process)}"


def test_every_kill_is_at_a_point_that_exists() -> None:
    existing = {point for points in points_by_file().values() for point in points}
    assert set.union(*(process for processes in KILLED.values() for process in processes)) == existing


def test_every_fault_point_is_one_that_this_file_reads() -> None:
    source = "".join(p.read_text(encoding="utf-8") for p in MEMORY.glob("*.[ch]") if p.name != "_fault.h")
    assert source.count("FAULT(") == sum(map(len, points_by_file().values())) > 30
