"""The report as tables, JSON and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from services.bench.serve.figures import Figures, Percentiles, gaps_ms
from services.bench.serve.plan import ServePlan
from services.bench.serve.run import Played

LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
NAMES = {"ttft_ms": "TTFT, ms", "tpot_ms": "TPOT, ms", "itl_ms": "ITL, ms", "e2e_ms": "E2E, ms"}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The loads of a run."""

    plan: ServePlan
    machine: dict[str, Any]
    played: Sequence[Played]

    @property
    def has_failures(self) -> bool:
        """Whether a request failed."""
        return any(outcome.error for played in self.played for one in played.rounds for outcome in one)

    def render(self) -> str:
        """Return a table for each load: a row for each figure, a column for each pod and its ratio to the first."""
        parts = [machine_line(self.machine)]
        for name in dict.fromkeys(played.load for played in self.played):
            some = [one for one in self.played if one.load == name]
            parts.append(_load_table(name, self.plan, some))
        return "\n\n".join(parts) + "\n"

    def write_json(self, path: Path) -> None:
        """Write plain values; NaN as null."""
        plan = self.plan
        tree = {
            "machine": self.machine,
            "rounds": plan.rounds,
            "seed": plan.seed,
            "slo": asdict(plan.slo),
            "loads": [_entry(plan, played) for played in self.played],
        }
        write_json(tree, path)

    def write_plot(self, path: Path) -> None:
        """Draw for each load the shares of requests, and of gaps between tokens, that were at most so slow."""
        panels = []
        for load in dict.fromkeys(played.load for played in self.played):
            some = {one.variant: _samples(one) for one in self.played if one.load == load}
            for title in ("TTFT, ms", "ITL, ms", "E2E, ms"):
                panels.append((f"{load}: {title}", {label: found[title] for label, found in some.items()}))
        draw(panels, path, columns=3)


def machine_line(machine: dict[str, Any]) -> str:
    """Return what the figures were taken on."""
    cpu = machine["cpu"] or machine["architecture"]
    return f"{machine['cores']} cores, {cpu}, Linux {machine['kernel']}, Python {machine['python']}"


def write_json(tree: Any, path: Path) -> None:
    """Write plain values to a file; NaN as null."""
    path.write_text(json.dumps(_without_nan(tree), indent=1, allow_nan=False))


def draw(panels: Sequence[tuple[str, dict[str, list[float]]]], path: Path, columns: int) -> None:
    """Draw a panel for each (title, label -> samples): the share of samples over their size."""
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = import_module("matplotlib.pyplot")
    num_rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(num_rows, columns, figsize=(5 * columns, 4 * num_rows), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
        for label, samples in lines.items():
            if samples:
                shares = [(i + 1) / len(samples) for i in range(len(samples))]
                axis.plot(sorted(samples), shares, label=label)
        axis.set(title=title, xscale="log", ylim=(0, 1))
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return lines with right-aligned columns."""
    first = max(len(name) for name, _ in rows)
    widths = [max(len(head), *(len(cells[i]) for _, cells in rows)) for i, head in enumerate(columns)]
    lines = [title, " " * first + "".join(f"  {c:>{w}}" for c, w in zip(columns, widths, strict=True))]
    for name, cells in rows:
        line = f"{name:<{first}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True))
        lines.append(line.rstrip())
    return "\n".join(lines)


def joined(values: Sequence[float], digits: int = 2) -> str:
    """Return `a / b / c`, each with as many decimals as its size deserves."""
    return " / ".join(number(value, digits) for value in values)


def number(value: float, digits: int = 2) -> str:
    """Return a figure as text; - for NaN."""
    if math.isnan(value):
        return "-"
    shown = digits if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{shown}f}"


def values_of(percentiles: Percentiles) -> tuple[float, float, float]:
    """Return p50, p90, p99."""
    return percentiles.p50, percentiles.p90, percentiles.p99


# --------------------------------------------------------------------------- a load

Row = tuple[str, Callable[[Played, Figures], str], Callable[[Played, Figures], Sequence[float]] | None]


def _rows() -> list[Row]:
    def latency(name: str) -> Row:
        return (
            NAMES[name],
            lambda _, f: joined(values_of(getattr(f, name))),
            lambda _, f: values_of(getattr(f, name)),
        )

    return [
        ("requests, failed", lambda _, f: f"{f.num_requests}, {f.num_failed}", None),
        ("tokens/s", lambda _, f: number(f.tokens_per_s), lambda _, f: (f.tokens_per_s,)),
        (
            "goodput, requests/s (share)",
            lambda _, f: f"{number(f.goodput_per_s)} ({f.good:.0%})",
            lambda _, f: (f.goodput_per_s,),
        ),
        *(latency(name) for name in LATENCIES),
        (
            "cached prompt tokens, % (ideal)",
            lambda _, f: f"{number(100 * f.hit_rate)} ({number(100 * f.ideal_hit_rate)})",
            None,
        ),
        ("cached per request, %", lambda _, f: joined([100 * v for v in values_of(f.cached)]), None),
        (
            "decode step, ms: p50 / p99 / p99.9",
            lambda p, _: joined([us / 1000 for us in p.step_us]) or "-",
            lambda p, _: p.step_us,
        ),
        (
            "decode step, p99 / p50",
            lambda p, _: number(p.step_us[1] / p.step_us[0]) if p.step_us else "-",
            None,
        ),
        ("CPU of the pod, of the generator, s", lambda p, _: joined([p.cpu_s, p.generator_cpu_s]), None),
        ("requests left late by, ms", lambda _, f: joined(values_of(f.lag_ms)), None),
    ]


def _load_table(name: str, plan: ServePlan, some: list[Played]) -> str:
    all_figures = [played.figures(plan) for played in some]
    slo = plan.slo
    left_out = f"; {some[0].num_left_out} requests exceed the window" if some[0].num_left_out else ""
    title = f"{name} (p50 / p90 / p99; SLO: TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms{left_out})"
    columns = [some[0].variant]
    for played in some[1:]:
        columns += [played.variant, "ratio"]
    rows = []
    for label, show, measure in _rows():
        cells = [show(some[0], all_figures[0])]
        for played, figures in zip(some[1:], all_figures[1:], strict=True):
            cells.append(show(played, figures))
            base = measure(some[0], all_figures[0]) if measure else ()
            other = measure(played, figures) if measure else ()
            cells.append(joined(ratios(other, base)))
        rows.append((label, cells))
    notes = [
        f"{one.variant}: {error}" for one, f in zip(some, all_figures, strict=True) for error in f.errors
    ]
    return "\n".join([table(title, columns, rows), *notes])


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return each value over its base; NaN where the base is 0. Empty when either has none."""
    if not values or not base:
        return []
    return [a / b if b else float("nan") for a, b in zip(values, base, strict=True)]


def _entry(plan: ServePlan, played: Played) -> dict[str, Any]:
    figures = played.figures(plan)
    entry = {"load": played.load, "variant": played.variant, **asdict(figures)}
    entry |= {"hit_rate": figures.hit_rate, "ideal_hit_rate": figures.ideal_hit_rate}
    entry |= {"num_left_out": played.num_left_out, "cpu_s": played.cpu_s}
    entry |= {"generator_cpu_s": played.generator_cpu_s, "step_us": list(played.step_us)}
    return entry


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _samples(played: Played) -> dict[str, list[float]]:
    done = [outcome for one in played.rounds for outcome in one if not outcome.error]
    return {
        "TTFT, ms": [outcome.ttft_s * 1000 for outcome in done],
        "ITL, ms": [ms for outcome in done for ms in gaps_ms(outcome)],
        "E2E, ms": [(outcome.end_s - outcome.due_s) * 1000 for outcome in done],
    }
