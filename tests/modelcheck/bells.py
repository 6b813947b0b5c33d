"""Doorbells as programs of the model checker: who rings and who waits. Each ringer i publishes word[i] first.

`WAIT` is `await_change` of bus/memory/_native.c inside any loop that reads `seq`, then looks for work; `RING`
is `ring_bell` of _native.h. `PATIENT_WAIT` and `PATIENT_RING` are those of A2E/E2A (_relay*.c), where a waiter says
from which `seq` on it wants to be woken. `QUIET_WAIT` and `QUIET_RING` are `group_await` and `group_ring` of
_collectives_group.c: only sleepers are rung for, so a waiter looks once more behind its mark. `QUIET_WAIT_FOR_ALL`
is that of an attention rank (_relay_attention_recv.c), which does not sleep if that look finds anything. A waiter's
`{look}` is made by `look`.
"""

from __future__ import annotations

from tests.modelcheck.program import mutate

RING = """
    store release word[{i}] = 1
    n = add seq_cst seq 1           # SYNC: doorbell, SYNC: word
    s = load seq_cst sleepers       # SYNC: doorbell
    if s == 0 goto out
    wake seq
out:
"""
PATIENT_RING = mutate(
    RING,
    "    wake seq\n",
    """
    p = load seq_cst patient
    if p == 0 goto call
    w = load seq_cst wake_at
    if n < w goto out
call:
    wake seq
""",
)
QUIET_RING = mutate(
    PATIENT_RING,
    """
    n = add seq_cst seq 1           # SYNC: doorbell, SYNC: word
    s = load seq_cst sleepers       # SYNC: doorbell
    if s == 0 goto out
""",
    """
    fence seq_cst                   # SYNC: bell-quiet
    s = load relaxed sleepers       # SYNC: bell-quiet
    if s == 0 goto out
    n = add seq_cst seq 1           # SYNC: doorbell, SYNC: word
""",
)
WAIT = """
again:
    seen = load acquire seq         # SYNC: word
    {look}
    if missing == 0 goto out
    m = add seq_cst sleepers 1      # SYNC: doorbell
check:
    now = load seq_cst seq          # SYNC: doorbell
    if now != seen goto awake
    sleep seq == seen
    goto check
awake:
    m = add seq_cst sleepers -1
    goto again
out:
"""
PATIENT_WAIT = """
again:
    seen = load acquire seq         # SYNC: word
    {look}
    if missing == 0 goto out
    store seq_cst wake_at = seen + missing
    store seq_cst patient = 1
    m = add seq_cst sleepers 1      # SYNC: doorbell
    now = load seq_cst seq          # SYNC: doorbell
    if now != seen goto awake
    sleep seq == seen
awake:
    m = add seq_cst sleepers -1
    store seq_cst patient = 0
    goto again
out:
"""
QUIET_WAIT = """
again:
    {look}
    if missing == 0 goto out
    m = add seq_cst sleepers 1      # SYNC: bell-quiet
    fence seq_cst                   # SYNC: bell-quiet
    seen = load acquire seq         # SYNC: word
    {look}
    if missing == 0 goto awake
    store seq_cst wake_at = seen + missing
    store seq_cst patient = 1
check:
    now = load seq_cst seq          # SYNC: doorbell
    if now >= seen + missing goto over
    sleep seq == now
    goto check
over:
    store seq_cst patient = 0
awake:
    m = add seq_cst sleepers -1
    goto again
out:
"""
QUIET_WAIT_FOR_ALL = mutate(
    mutate(
        QUIET_WAIT,
        "    m = add seq_cst sleepers 1 ",
        "    before := missing\n    m = add seq_cst sleepers 1 ",
    ),
    "if missing == 0 goto awake",
    "if missing != before goto awake",
)


def look(*words: int) -> str:
    """Look at these words; `missing` = how many have not come."""
    loads = [f"x{i} = load acquire word[{i}]" for i in words]
    return "\n".join([*loads, "missing := " + " + ".join(f"(x{i} == 0)" for i in words)])
