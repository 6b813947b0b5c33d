"""Every `SYNC:` label stands on both sides of what it orders, and in the normative table of bus/README.md."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

BUS = Path(__file__).resolve().parents[4] / "bus"
LABEL = re.compile(r"SYNC: ([a-z][a-z0-9-]*)")
PUBLISHES = re.compile(
    r"__ATOMIC_RELEASE|store_|publish|write_cell|push\(|release -|becomes visible|becomes\svisible"
)
TAKES = re.compile(r"__ATOMIC_ACQUIRE|load_|read_cell|scan_cells|refresh|acquire")
BOTH = re.compile(r"_fetch\(|fetch_(add|sub)_?|compare_exchange")  # read-modify-write, always seq_cst here
MEASURING = "_native_bench.c"  # its flag belongs to no protocol


def labelled_lines() -> Iterator[tuple[str, str, str]]:
    """Yield (place, label, the statement or remark that bears it)."""
    for path in sorted([*BUS.rglob("*.py"), *BUS.rglob("*.[ch]")]):
        lines = path.read_text(encoding="utf-8").splitlines()
        for i, line in enumerate(lines):
            for label in LABEL.findall(line):
                if path.name != MEASURING:
                    yield f"{path.name}:{i + 1}", label, " ".join(lines[max(0, i - 1) : i + 1])


def table_labels() -> set[str]:
    """Return the labels of the last column of the table in "Memory order"."""
    text = (BUS / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Memory order\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return {label.strip() for row in rows for label in row[-2].split(",") if label.strip()}


def test_every_label_is_in_the_table_and_every_label_of_the_table_in_the_code() -> None:
    assert {label for _, label, _ in labelled_lines()} == table_labels()


@pytest.mark.parametrize("label", sorted(table_labels()))
def test_every_label_has_a_side_that_publishes_and_one_that_takes(label: str) -> None:
    sides: dict[str, list[str]] = defaultdict(list)
    for place, found, text in labelled_lines():
        if found == label:
            sides["publishes"] += [place] * bool(PUBLISHES.search(text) or BOTH.search(text))
            sides["takes"] += [place] * bool(TAKES.search(text) or BOTH.search(text))
    assert sides["publishes"], f"{label}: nobody publishes"
    assert sides["takes"], f"{label}: nobody takes"


def test_every_atomic_of_an_order_bears_a_label() -> None:
    """A release or an acquire without a label has no known partner."""
    bare = []
    for path in sorted(BUS.rglob("*.[ch]")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for i, line in enumerate(lines):
            is_ordered = "__ATOMIC_RELEASE" in line or "__ATOMIC_ACQUIRE" in line
            if is_ordered and not LABEL.search(" ".join(lines[i : i + 2])):
                bare.append(f"{path.name}:{i + 1}: {line.strip()}")
    assert bare == []
