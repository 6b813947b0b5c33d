"""The little language in which protocols are written down for the checker: one shared access per line.

    label:                              a place to jump to
    x := EXPR                           private; costs no step
    x = load ORDER VAR                  one shared load
    store ORDER VAR = EXPR              one shared store
    x = add ORDER VAR EXPR              an atomic addition; x is the new value
    x = update ORDER VAR EXPR           an atomic update, as a loop of compare and swap makes it: EXPR names the value
                                        that was there `old`; x is that one
    fence release|acquire|seq_cst
    goto LABEL / if EXPR goto LABEL
    until EXPR                          the environment's patience: goes on in the step in which EXPR holds
    sleep VAR == EXPR                   futex wait: returns at once if VAR differs, otherwise sleeps until woken
    sleep VAR == EXPR or timeout        ... or until the time is over, which may be at any moment
    wake VAR                            futex wake all
    assert EXPR                         a property; the checker shows how it was broken
    end                                 the thread has finished (so does falling off the last line)

ORDER is relaxed, acquire, release or seq_cst. VAR is a shared word, or an element such as `slot[tail % 2]` of
the shared words slot[0], slot[1]. EXPR is a Python expression over the thread's registers; in `until` it may
also name shared words. Text after # is a comment. A program is data, so a *mutant* of it is a replacement in
its text (`mutate`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import CodeType

ORDERS = ("relaxed", "acquire", "release", "seq_cst")
_VAR = r"(\w+(?:\[[^\]]*\])?)"
_ORDER = rf"({'|'.join(ORDERS)})"
_PATTERNS = [
    ("label", re.compile(r"(\w+):")),
    ("set", re.compile(r"(\w+) := (.+)")),
    ("load", re.compile(rf"(\w+) = load {_ORDER} {_VAR}")),
    ("add", re.compile(rf"(\w+) = add {_ORDER} {_VAR} (.+)")),
    ("update", re.compile(rf"(\w+) = update {_ORDER} {_VAR} (.+)")),
    ("store", re.compile(rf"store {_ORDER} {_VAR} = (.+)")),
    ("fence", re.compile(r"fence (release|acquire|seq_cst)")),
    ("goto", re.compile(r"goto (\w+)")),
    ("if", re.compile(r"if (.+) goto (\w+)")),
    ("until", re.compile(r"until (.+)")),
    ("sleep", re.compile(rf"sleep {_VAR} == (.+?)( or timeout)?")),
    ("wake", re.compile(rf"wake {_VAR}")),
    ("assert", re.compile(r"assert (.+)")),
    ("end", re.compile(r"end")),
]


@dataclass(frozen=True, eq=False)
class Op:
    """One line. `index` and `value` are expressions over registers; `reads` are the registers that they
    name."""

    text: str
    kind: str
    order: str = ""
    dst: str = ""
    var: str = ""  # name of the shared word, or of the family that `index` selects from
    index: CodeType | None = None
    value: CodeType | None = None
    target: int = -1
    can_time_out: bool = False
    reads: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Program:
    """A thread's code. `registers` are its private words, all 0 in the beginning but for `start`.

    `live[pc]` are the registers that may still be read from there on: the others' values do not make a state
    another one.
    """

    name: str
    ops: tuple[Op, ...]
    registers: tuple[str, ...]
    start: tuple[int, ...]
    live: tuple[frozenset[str], ...]


def mutate(text: str, old: str, new: str) -> str:
    """Return `text` with its only occurrence of `old` replaced; a mutant that changes nothing is an error."""
    if text.count(old) != 1:
        raise ValueError(f"{old!r} occurs {text.count(old)} times")
    return text.replace(old, new)


def parse(name: str, text: str, **start: int) -> Program:
    """Return the program `text`; `start` gives registers their first values. ValueError names the line."""
    lines = [line for raw in text.splitlines() if (line := raw.split("#")[0].strip())]
    matched = [_match(line) for line in lines]
    labels: dict[str, int] = {}
    kept: list[tuple[str, str, tuple[str, ...]]] = []
    for line, (kind, groups) in zip(lines, matched, strict=True):
        if kind == "label":
            labels[groups[0]] = len(kept)
        else:
            kept.append((line, kind, groups))
    ops = tuple(_op(line, kind, groups, labels) for line, kind, groups in kept)
    names = {op.dst for op in ops if op.dst} | set(start)
    registers = tuple(sorted(names))
    ops = tuple(Op(**{**vars(op), "reads": op.reads & names}) for op in ops)
    return Program(name, ops, registers, tuple(start.get(r, 0) for r in registers), _live(ops))


def _live(ops: tuple[Op, ...]) -> tuple[frozenset[str], ...]:
    """Return the registers that are live before each line, and none after the last: backwards until nothing
    changes."""
    live = [frozenset[str]()] * (len(ops) + 1)
    changed = True
    while changed:
        changed = False
        for pc in reversed(range(len(ops))):
            op = ops[pc]
            after = frozenset[str]() if op.kind in ("goto", "end") else live[pc + 1]
            after |= live[op.target] if op.target >= 0 else frozenset()
            before = op.reads | (after - {op.dst})
            changed |= before != live[pc]
            live[pc] = before
    return tuple(live)


def _match(line: str) -> tuple[str, tuple[str, ...]]:
    for kind, pattern in _PATTERNS:
        found = pattern.fullmatch(line)
        if found:
            return kind, tuple(group or "" for group in found.groups())
    raise ValueError(f"not a line of the language: {line!r}")


def _op(line: str, kind: str, groups: tuple[str, ...], labels: dict[str, int]) -> Op:
    if kind == "set":
        return _with(line, kind, value=groups[1], dst=groups[0])
    if kind == "load":
        return _with(line, kind, order=groups[1], var=groups[2], dst=groups[0])
    if kind in ("add", "update"):
        return _with(line, kind, order=groups[1], var=groups[2], value=groups[3], dst=groups[0])
    if kind == "store":
        return _with(line, kind, order=groups[0], var=groups[1], value=groups[2])
    if kind == "fence":
        return Op(line, kind, order=groups[0])
    if kind == "goto":
        return Op(line, kind, target=labels[groups[0]])
    if kind == "if":
        return _with(line, kind, value=groups[0], target=labels[groups[1]])
    if kind == "sleep":
        return _with(line, kind, var=groups[0], value=groups[1], can_time_out=bool(groups[2]))
    if kind == "wake":
        return _with(line, kind, var=groups[0])
    return _with(line, kind, value=groups[0]) if kind in ("until", "assert") else Op(line, kind)


def _with(
    line: str,
    kind: str,
    *,
    order: str = "",
    dst: str = "",
    var: str = "",
    value: str = "",
    target: int = -1,
    can_time_out: bool = False,
) -> Op:
    family, _, index_text = var.partition("[")
    index = compile(index_text.rstrip("]"), line, "eval") if index_text else None
    code = compile(value, line, "eval") if value else None
    reads = frozenset(name for c in (index, code) if c is not None for name in c.co_names)
    return Op(line, kind, order, dst, family, index, code, target, can_time_out, reads)
