"""The report as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, TypeVar

from bus.bench.collectives import ALL_TO_ALL, MOE
from bus.bench.p2p import IDLE, ONE_PAIR
from bus.bench.p2p import SECTION as P2P
from bus.bench.peers.limit_rows import LIMIT
from bus.bench.report import Report
from bus.bench.session import OURS, Record

Cell = Callable[[Record], str]
T = TypeVar("T")


def render(report: Report) -> str:
    """Return all tables."""
    parts = [machine_line(report), *p2p_tables(report.of(P2P)), *plain_tables(report.of(ALL_TO_ALL))]
    parts += [
        *moe_tables(report.of(MOE)),
        *moe_summary(report.of(MOE)),
        *trampoline_table(report),
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
    crowd = [r for r in records if r.case["scenario"] not in (ONE_PAIR, IDLE)]
    if crowd:
        scenarios = _unique(str(r.case["scenario"]) for r in crowd)
        title = f"{crowd[0].case['size']} bytes, one way, us: p50 / p99"
        found.append(
            _table(title, _unique(r.way for r in crowd), scenarios, _cells(crowd, "scenario", _times))
        )
    idle = [r for r in records if r.case["scenario"] == IDLE]
    if idle:
        cells = {(r.way, "CPU, %"): f"{r.extra['cpu_percent']:.2f}" for r in idle}
        found.append(_table("a waiter to whom nobody sends", _unique(r.way for r in idle), ["CPU, %"], cells))
    return found


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


def trampoline_table(report: Report) -> list[str]:
    """Return A2E/E2A at the paper's shape, both ways."""
    found = report.trampolines
    if not found:
        return []
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "p50 / p99": lambda case: f"{_us(case['p50_us'])} / {_us(case['p99_us'])}",
        "send p50": lambda case: _us(case["send_p50_us"]),
        "A2E cells per rank": lambda case: f"{case['a2e_cell_writes_per_rank']:g}",
        "picked by the rule": lambda case: "yes" if case["picked"] else "",
    }
    names = [f"{case['num_bytes']:>9} B to {case['targets']:>3} ranks, {case['way']}" for case in found]
    cells = {
        (name, column): cell(case)
        for name, case in zip(names, found, strict=True)
        for column, cell in columns.items()
    }
    title = "A2E + E2A, 160 attention and 288 expert ranks in 16 processes, us"
    return [_table(title, names, list(columns), cells)]


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


def _shape(record: Record) -> str:
    case = record.case
    return f"batch {case['batch']:>3} hidden {case['hidden']:>5} top-{case['top_k']} {case['kind']}"


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
    mark = "" if ratio is None or record.way == OURS else f" ({ratio:.1f})"
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
