"""The report as a picture; needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from bus.bench.collectives import ALL_TO_ALL, MOE
from bus.bench.p2p import ONE_PAIR
from bus.bench.p2p import SECTION as P2P
from bus.bench.report import Report
from bus.bench.session import Record
from bus.errors import ConfigError

SUFFIXES = (".png", ".svg")


def check(path: Path) -> None:
    """Raise ConfigError if a picture cannot be drawn there: before the run, not after it."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: must end with {' or '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f"--plot {path}: needs matplotlib, which is not installed (pip install 'xdeepserve[bench]')"
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: {path.parent} is not a folder")


def write_plot(report: Report, path: Path) -> None:
    """Draw latency over size for each pair, each number of ranks, and the times of the MoE shapes."""
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = import_module("matplotlib.pyplot")
    panels = _panels(report)
    figure, axes = pyplot.subplots(
        1, max(1, len(panels)), figsize=(6 * max(1, len(panels)), 5), squeeze=False
    )
    for axis, (title, unit, records, place) in zip(axes[0], panels, strict=False):
        _draw(axis, title, unit, records, place)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


Panel = tuple[str, str, Sequence[Record], str]


def _panels(report: Report) -> list[Panel]:
    """Return title, name of the x axis, records and the case's field on it, for each part of the picture."""
    panels: list[Panel] = []
    one = [r for r in report.of(P2P) if r.case["scenario"] == ONE_PAIR]
    if one:
        panels.append(("one pair, one way", "bytes", one, "size"))
    plain = report.of(ALL_TO_ALL)
    for ranks in sorted({int(r.case["ranks"]) for r in plain}):
        some = [r for r in plain if r.case["ranks"] == ranks]
        panels.append((f"all-to-all, {ranks} ranks", "bytes per pair", some, "size"))
    moe = [r for r in report.of(MOE) if r.case["kind"] == "float32"]
    if moe:
        ranks, hidden, top_k = (max(int(r.case[name]) for r in moe) for name in ("ranks", "hidden", "top_k"))
        for form in sorted({str(r.case["form"]) for r in moe}):
            wanted = {"ranks": ranks, "hidden": hidden, "top_k": top_k, "form": form}
            some = [r for r in moe if wanted.items() <= r.case.items()]
            panels.append(
                (f"{form}, {ranks} ranks, hidden {hidden}, top-{top_k}", "tokens per rank", some, "batch")
            )
    return panels


def _draw(axis: Any, title: str, unit: str, records: Sequence[Record], place: str) -> None:
    for way in dict.fromkeys(record.way for record in records):
        points = sorted((int(r.case[place]), r.figures.p50_us) for r in records if r.way == way)
        axis.plot(*zip(*points, strict=True), marker="o", label=way)
    axis.set(title=title, xlabel=unit, ylabel="p50, us", xscale="log", yscale="log")
    axis.grid(visible=True, which="major", alpha=0.3)
    axis.legend(fontsize="small")
