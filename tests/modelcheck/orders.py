"""What keeps two operations of a thread in order: what C11 and Arm promise, and no more.

The same word; a register that one writes and the other reads; an acquire load before everything later; everything
earlier before a release store; two seq_cst operations; a fence; a store, and whatever leaves the thread, behind the
branches before it. System calls are full fences. A release fence keeps earlier accesses before later stores, an acquire
fence earlier loads before later accesses. Which word an operation touches is for `machine.py`.
"""

from __future__ import annotations

from tests.modelcheck.program import Op

CALLS = frozenset({"sleep", "wake", "until"})
WRITES = frozenset({"store", "add", "update"})
LOADS = frozenset({"load", "add", "update"})
ACCESSES = WRITES | LOADS


def behind_branch(branch: Op, later: Op) -> bool:
    """What must not happen before a branch is decided, or would change what it reads."""
    is_visible = later.kind in WRITES or later.kind in CALLS or later.kind == "assert"
    return is_visible or (bool(later.dst) and later.dst in branch.reads)


def is_ordered(earlier: Op, later: Op) -> bool:
    """Tell whether program order binds, but for two accesses to the same word."""
    if earlier.kind in CALLS or later.kind in CALLS:
        return True
    if earlier.dst and (earlier.dst in later.reads or earlier.dst == later.dst):
        return True
    if later.dst and later.dst in earlier.reads:
        return True
    if "fence" in (earlier.kind, later.kind):
        return _is_fenced(earlier, later)
    if earlier.kind not in ACCESSES or later.kind not in ACCESSES:
        return False
    if earlier.kind in LOADS and earlier.order in ("acquire", "seq_cst"):
        return True
    if later.kind in WRITES and later.order in ("release", "seq_cst"):
        return True
    return earlier.order == later.order == "seq_cst"


def _is_fenced(earlier: Op, later: Op) -> bool:
    if earlier.kind == later.kind:
        return True
    if earlier.kind == "fence":
        if earlier.order == "release":
            return later.kind in WRITES
        return later.kind in ACCESSES
    if later.order == "acquire":
        return earlier.kind in LOADS
    return earlier.kind in ACCESSES
