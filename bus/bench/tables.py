"""The report as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import median
from typing import Any, TypeVar

from bus.bench import routes
from bus.bench.collectives import ALL_TO_ALL, MOE
from bus.bench.crowd import SECTION as CROWD
from bus.bench.kinds import SECTION as KINDS
from bus.bench.p2p import IDLE, ONE_PAIR
from bus.bench.p2p import SECTION as P2P
from bus.bench.peers.limit_rows import LIMIT
from bus.bench.report import Report
from bus.bench.session import OURS, Record
from bus.bench.thresholds import SECTION as THRESHOLDS

Cell = Callable[[Record], str]
T = TypeVar("T")


def render(report: Report) -> str:
    """Return all tables."""
    parts = [machine_line(report), *p2p_tables(report.of(P2P)), *crowd_table(report.of(CROWD))]
    parts += [
        *plain_tables(report.of(ALL_TO_ALL)),
        *moe_tables(report.of(MOE)),
        *moe_summary(report.of(MOE)),
        *moe_unevenness(report.of(MOE)),
        *kinds_tables(report.of(KINDS)),
        *routes.moe_lines(report, _shape),
        *trampoline_table(report),
        *threshold_tables(report.of(THRESHOLDS)),
        *absent(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def machine_line(report: Report) -> str:
    """Return what the figures were taken on."""
    facts = report.machine
    load = " ".join(f"{value:.2f}" for value in facts["load"])
    return (
        f"{facts['cores']} cores, {facts['cpu'] or facts['architecture']}, Linux {facts['kernel']}, "
        f"Python {facts['python']}; load at the start {load}; {report.seconds:.0f} s"
    )


def p2p_tables(records: Sequence[Record]) -> list[str]:
    """Return the tables of the ping-pong."""
    one = [record for record in records if record.case["scenario"] == ONE_PAIR]
    found = []
    if one:
        found += [
            _by_size("one pair, one way, us: p50 / p99", one, _times),
            _by_size("one pair, GB/s: size / p50", one, _bandwidth),
            _by_size("one pair, p50 relative to the C limit in the same blocks", one, _extra("to_limit")),
            _by_size("one pair, p50 relative to ours adaptive", one, _extra("to_ours")),
        ]
    idle = [r for r in records if r.case["scenario"] == IDLE]
    if idle:
        cells = {(r.way, "CPU, %"): f"{r.extra['cpu_percent']:.2f}" for r in idle}
        found.append(_table("a waiter to whom nobody sends", _unique(r.way for r in idle), ["CPU, %"], cells))
    return found


def crowd_table(records: Sequence[Record]) -> list[str]:
    """Return the table of the pairs that share the cores with others."""
    if not records:
        return []
    scenarios = _unique(str(r.case["scenario"]) for r in records)
    title = f"{records[0].case['size']} bytes, one way, us: p50 / p99"
    return [_table(title, _unique(r.way for r in records), scenarios, _cells(records, "scenario", _times))]


def plain_tables(records: Sequence[Record]) -> list[str]:
    """Return a table of plain all-to-all for each number of ranks."""
    found = []
    for ranks in _unique(r.case["ranks"] for r in records):
        some = [r for r in records if r.case["ranks"] == ranks]
        title = f"all-to-all, {ranks} ranks, bytes per pair, us: mean, p50 / p99 (mean relative to ours)"
        found.append(_by_size(title, some, _mean_and_times))
    return found


def moe_tables(records: Sequence[Record]) -> list[str]:
    """Return a table of the shapes for each form and number of ranks."""
    found = []
    for ranks, form in _unique((r.case["ranks"], r.case["form"]) for r in records):
        some = [r for r in records if (r.case["ranks"], r.case["form"]) == (ranks, form)]
        title = f"{form}, {ranks} ranks, us: p50 / p99 (p50 relative to ours)"
        cells = {(_shape(r), r.way): _limit(r) if r.way == LIMIT else _times_and_ratio(r) for r in some}
        found.append(_table(title, _unique(map(_shape, some)), _unique(r.way for r in some), cells))
    return found


def moe_summary(records: Sequence[Record]) -> list[str]:
    """Return how many times faster ours is: median over the shapes (the least), by form, kind and ranks."""
    peers = _unique(r.way for r in records if not r.way.startswith(OURS) and r.way != LIMIT)
    if not peers:
        return []
    groups = _unique((r.case["form"], r.case["kind"], r.case["ranks"]) for r in records)
    cells = {}
    for group in groups:
        some = [r for r in records if (r.case["form"], r.case["kind"], r.case["ranks"]) == group]
        for peer in peers:
            ratios = [r.extra["to_ours"] for r in some if r.way == peer and "to_ours" in r.extra]
            if ratios:
                cells[_group(group), peer] = f"{median(ratios):.1f} ({min(ratios):.1f})"
    title = "MoE shapes, time relative to ours: median over the shapes (least)"
    return [_table(title, [_group(group) for group in groups], peers, cells)]


def moe_unevenness(records: Sequence[Record]) -> list[str]:
    """Return p99 in medians, and of bare loops as long: medians over the shapes, by form, kind and ranks."""
    ways = _unique(r.way for r in records if r.way != LIMIT)
    groups = _unique((r.case["form"], r.case["kind"], r.case["ranks"]) for r in records)
    cells = {}
    for group, way in product(groups, ways):
        some = [
            r for r in records if (r.case["form"], r.case["kind"], r.case["ranks"], r.way) == (*group, way)
        ]
        pairs = [
            (r.extra["unevenness"], r.extra["bare_unevenness"]) for r in some if "bare_unevenness" in r.extra
        ]
        if pairs:
            own, bare = (median(column) for column in zip(*pairs, strict=True))
            cells[_group(group), way] = f"{own:.2f}, {bare:.2f}: {median(a / b for a, b in pairs):.2f}"
    title = "MoE shapes, p99 / p50, of bare loops as long (bus/bench/bare.py): their ratio; medians over the shapes"
    return [_table(title, [_group(group) for group in groups], ways, cells)] if cells else []


def kinds_tables(records: Sequence[Record]) -> list[str]:
    """Return how long ours takes with INT8 rows relative to float32 rows, for each number of ranks."""
    found = []
    for ranks in _unique(r.case["ranks"] for r in records):
        some = [r for r in records if r.case["ranks"] == ranks]
        cells = {
            (_size(r), str(r.case["form"])): f"{r.extra['to_float32']:.2f} "
            f"({r.extra['to_float32_low']:.2f} to {r.extra['to_float32_high']:.2f})"
            for r in some
        }
        title = f"ours, {ranks} ranks, mean with INT8 relative to float32, turn by turn: median (quartiles)"
        found.append(
            _table(title, _unique(map(_size, some)), _unique(str(r.case["form"]) for r in some), cells)
        )
    return found


def trampoline_table(report: Report) -> list[str]:
    """Return A2E/E2A at the paper's shape, both ways, and what the rule that was fitted to it picks."""
    found = report.trampolines
    if not found:
        return []
    direct, trampoline = (
        {(case["num_bytes"], case["targets"]): case for case in found if case["way"] == way}
        for way in ("direct", "trampoline")
    )
    columns: dict[str, Callable[[dict[str, Any], dict[str, Any]], str]] = {
        "direct": lambda a, b: f"{_us(a['p50_us'])} / {_us(a['p99_us'])}",
        "trampoline": lambda a, b: f"{_us(b['p50_us'])} / {_us(b['p99_us'])}",
        "send": lambda a, b: f"{_us(a['send_p50_us'])}, {_us(b['send_p50_us'])}",
        "A2E cells": lambda a, b: f"{a['a2e_cell_writes_per_rank']:g}, {b['a2e_cell_writes_per_rank']:g}",
        "picked": lambda a, b: a["way"] if a["picked"] else b["way"],
        "slower than the winner": lambda a, b: f"{100 * (a['pick_to_winner'] - 1):.0f} %",
    }
    cells = {
        (_load(key), column): cell(direct[key], trampoline[key])
        for key in direct
        for column, cell in columns.items()
    }
    title = (
        "A2E + E2A, 160 attention and 288 expert ranks in 16 processes, us: p50 / p99; "
        "p50 of a rank's send, and its A2E cell writes, both ways"
    )
    table = _table(title, [_load(key) for key in direct], list(columns), cells)
    return [f'{table}\n{routes.SETTING} = "{found[0]["route_costs_ns"]}"']


def threshold_tables(records: Sequence[Record]) -> list[str]:
    """Return a table for each threshold: both paths at each size, which is faster, and what the setting loses."""
    found = []
    for name in _unique(str(r.case["threshold"]) for r in records):
        some = [r for r in records if r.case["threshold"] == name]
        sizes = sorted(_unique(int(r.case["size"]) for r in some))
        ways = _unique(r.way for r in some)
        cells = {(r.way, size_name(int(r.case["size"]))): _us(r.figures.p50_us) for r in some}
        for record in (r for r in some if "to_other" in r.extra):
            column, to_other = size_name(int(record.case["size"])), record.extra["to_other"]
            [other] = [way for way in ways if way != record.way]
            cells["chosen", column] = record.way
            cells["faster", column] = record.way if to_other <= 1 else other
            cells["lost, %", column] = f"{max(0.0, 100 * (to_other - 1)):.0f}"
        title = f"{name}, from {size_name(int(some[0].extra['setting']))} on: one way, us, p50"
        found.append(
            _table(title, [*ways, "chosen", "faster", "lost, %"], list(map(size_name, sizes)), cells)
        )
    return found


def _load(key: tuple[int, int]) -> str:
    return f"{key[0]:>9} B to {key[1]:>3} ranks"


def absent(report: Report) -> list[str]:
    """Return a line for each way without figures."""
    lines = [
        f"{a.way} ({a.section}): {'failed' if a.is_failure else 'missing'}: {a.reason}"
        for a in report.absences
    ]
    return ["\n".join(lines)] if lines else []


def _group(group: tuple[object, ...]) -> str:
    form, kind, ranks = group
    return f"{form}, {kind}, {ranks} ranks"


def _size(record: Record) -> str:
    case = record.case
    return f"batch {case['batch']:>3} hidden {case['hidden']:>5} top-{case['top_k']}"


def _shape(record: Record) -> str:
    return f"{_size(record)} {record.case['kind']}"


def _times(record: Record) -> str:
    return f"{_us(record.figures.p50_us)} / {_us(record.figures.p99_us)}"


def _times_and_ratio(record: Record) -> str:
    ratio = record.extra.get("to_ours")
    mark = "" if ratio is None or record.way == OURS else f" ({ratio:.1f})"
    return _times(record) + mark


def _limit(record: Record) -> str:
    ratio = record.extra.get("mean_to_ours")
    return _us(record.figures.mean_us) + ("" if ratio is None else f" ({ratio:.2f})")


def _mean_and_times(record: Record) -> str:
    ratio = record.extra.get("mean_to_ours")
    mark = "" if ratio is None or record.way.startswith(OURS) else f" ({ratio:.1f})"
    return f"{_us(record.figures.mean_us)}, {_times(record)}{mark}"


def _bandwidth(record: Record) -> str:
    return f"{record.extra['mb_per_s'] / 1000:.2f}" if "mb_per_s" in record.extra else ""


def _extra(name: str) -> Cell:
    return lambda record: f"{record.extra[name]:.2f}" if name in record.extra else ""


def _us(value: float) -> str:
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def size_name(size: int) -> str:
    """Return 64 B, 4 KiB, 8 MiB; the number of bytes when none fits."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def _by_size(title: str, records: Sequence[Record], cell: Cell) -> str:
    sizes = _unique(int(r.case["size"]) for r in records)
    shown = {(r.way, size_name(int(r.case["size"]))): cell(r) for r in records}
    ways = [
        way for way in _unique(r.way for r in records) if any(shown.get((way, size_name(s))) for s in sizes)
    ]
    return _table(title, ways, [size_name(size) for size in sizes], shown)


def _cells(records: Sequence[Record], column: str, cell: Cell) -> dict[tuple[str, str], str]:
    return {(r.way, str(r.case[column])): cell(r) for r in records}


def _unique(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _table(title: str, rows: Sequence[str], columns: Sequence[str], cells: dict[tuple[str, str], str]) -> str:
    """Return a table with a line for each row; a cell that is not there stays empty."""
    first = max(map(len, [*rows, ""]))
    widths = [max(len(column), *(len(cells.get((row, column), "")) for row in rows)) for column in columns]
    lines = [title, " " * first + "".join(f"  {c:>{w}}" for c, w in zip(columns, widths, strict=True))]
    for row in rows:
        line = [f"  {cells.get((row, c), ''):>{w}}" for c, w in zip(columns, widths, strict=True)]
        lines.append(f"{row:<{first}}" + "".join(line))
    return "\n".join(line.rstrip() for line in lines)
