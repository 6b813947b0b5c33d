"""The `console` blocks of a document: what a reader would type, and the shape of what then appears.

    $ command \\
        continued
    output
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"\n@@end (\d+) (\d+)@@\n")
_MEMBER_ROW = re.compile(r"((?:manager|gateway|scheduler|attention|expert)-\d+) +\d+ +\d+ +\w+ .*")
_ELLIPSIS = re.compile(r"\.\.\.|…")
_JOB = re.compile(r"\[\d+\][+-]?\s.*")  # what an interactive shell says of a command in the background


@dataclass(frozen=True)
class Step:
    """One command and the lines that the document shows below it."""

    command: str
    shown: tuple[str, ...]


def blocks(path: Path) -> list[list[Step]]:
    """Return the steps of every console block."""
    return [_steps(block) for block in _BLOCK.findall(path.read_text("utf-8"))]


def _steps(block: str) -> list[Step]:
    steps: list[tuple[list[str], list[str]]] = []
    continues = False
    for line in block.splitlines():
        if line.startswith("$ "):
            steps.append(([line[2:]], []))
        elif continues:
            steps[-1][0].append(line.removeprefix("> "))
        elif steps:
            steps[-1][1].append(line)
        continues = bool(steps) and not steps[-1][1] and line.endswith("\\")
    return [Step("\n".join(command), tuple(shown)) for command, shown in steps]


def run(
    commands: list[str], environ: Mapping[str, str], folder: Path, timeout_s: float
) -> list[tuple[int, str]]:
    """Run the commands of a block one after the other in one shell, in `folder`; return exit code and output of each.

    What commands in the background say counts to the one that runs when they say it.
    """
    marked = [f'{command}\nprintf "\\n@@end {n} %d@@\\n" $?' for n, command in enumerate(commands)]
    script = "\n".join([*marked, "wait"])
    result = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, **environ},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    parts = _MARK.split(result.stdout)
    codes, outputs = [int(code) for code in parts[2::3]], parts[0::3]
    assert len(codes) == len(commands), result.stdout
    outputs[-2:] = ["".join(outputs[-2:])]  # what comes after the last command belongs to it
    return list(zip(codes, outputs, strict=True))


def missing_lines(shown: Iterable[str], output: str) -> list[str]:
    """Return the shown lines whose shape occurs nowhere in `output`; [] when the document is right.

    Where a shown line has an ellipsis, anything may stand.
    """
    lines = [line for line in shown if line.strip() and not _JOB.fullmatch(line)]
    whole = "\n".join(lines)
    if isinstance(_parsed(whole), dict):  # perhaps JSON over several lines
        return [] if shape(whole) == shape(output.strip()) else [whole]
    shapes = {shape(line) for line in output.splitlines()}
    plain = [_plain(line) for line in output.splitlines()]
    return [line for line in lines if shape(line) not in shapes and not _occurs_cut(line, plain)]


def _occurs_cut(line: str, lines: list[str]) -> bool:
    pieces = _ELLIPSIS.split(_plain(line))
    pattern = re.compile(".*".join(re.escape(piece) for piece in pieces))
    return len(pieces) > 1 and any(pattern.fullmatch(one) for one in ["", *lines])


def shape(line: str) -> str:
    """Return what of a line is the same in every run: no numbers, no ids, of JSON the names alone."""
    prefix, text = ("data: ", line[6:]) if line.startswith("data: ") else ("", line)
    value = _parsed(text)
    if isinstance(value, dict):
        return prefix + json.dumps(_names(value), sort_keys=True)
    if member := _MEMBER_ROW.fullmatch(line.strip()):
        return f"{member[1]} row"
    return _plain(line)


def _plain(line: str) -> str:
    line = re.sub(r"cmpl-[0-9a-f]+", "cmpl-N", line)
    line = re.sub(r"0x[0-9a-f]+|\d+", "N", line)
    return re.sub(r"\s+", " ", line).strip()


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _names(value: object) -> object:
    if isinstance(value, dict):
        return {name: _names(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_names(value[0])] if value and isinstance(value[0], dict) else "list"
    return "value"
