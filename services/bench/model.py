"""`xds bench model`: the engine alone, beside transformers and llama.cpp, on one checkpoint.

1. The checkpoint is the one given, or a random one (`checkpoint.SHAPE`); llama.cpp gets the same weights as GGUF.
2. Every way is one process, or two that share the batch (the shape of a pod); all stay alive and sleep between tasks.
3. For each shape the ways take turns, several rounds long, so that a disturbance hits all of them.
4. Greedy tokens of all ways are compared: who computes something else (INT8 must) is named.

A decode figure is batch / median step; of two processes, the sum. A prefill figure is prompt tokens / seconds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bus.bench.machine import facts
from bus.errors import ConfigError
from services.bench.checkpoint import write_random
from services.model.config import load_config
from services.quantize.layer import Recipe
from services.quantize.quantizer import quantize

OURS = "ours"
GGUF_NAME, INT8_NAME = "model.gguf", "int8"
ANSWER_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Way:
    """An engine with its threads; `processes` share the batch."""

    name: str
    engine: str
    threads: int
    processes: int = 1
    modules: tuple[str, ...] = ()
    int8: bool = False

    def arguments(self, folder: Path, scratch: Path) -> list[str]:
        """Return the command's arguments."""
        if self.engine == "ours":
            return [str(scratch / INT8_NAME if self.int8 else folder)]
        return [str(scratch / GGUF_NAME if self.engine == "llama_cpp" else folder), str(self.threads)]


WAYS = (
    Way(OURS, "ours", 1),
    Way("ours, 2 processes", "ours", 1, 2),
    Way("ours, INT8", "ours", 1, int8=True),
    Way("transformers", "transformers", 1, modules=("torch", "transformers")),
    Way("transformers, 2 threads", "transformers", 2, modules=("torch", "transformers")),
    Way("llama.cpp", "llama_cpp", 1, modules=("llama_cpp", "gguf")),
    Way("llama.cpp, 2 threads", "llama_cpp", 2, modules=("llama_cpp", "gguf")),
)


PEERS = ("transformers", "llama.cpp")


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What to measure."""

    model: Path | None = None
    batch: tuple[int, ...] = (1, 8, 32)
    prompt: tuple[int, ...] = (128, 1024)
    output_tokens: int = 24
    rounds: int = 3
    peers: tuple[str, ...] = PEERS

    def check(self) -> None:
        """Raise ConfigError for a number that makes no sense."""
        for name, values in (("--batch", self.batch), ("--prompt", self.prompt)):
            for value in values:
                if not 1 <= value <= 65_536:
                    raise ConfigError(f"{name} {value}: must be in 1 .. 65536")
        for peer in self.peers:
            if peer not in PEERS:
                raise ConfigError(f"--peers {peer}: must be one of {', '.join(PEERS)}")
        if not 2 <= self.output_tokens <= 4096:
            raise ConfigError(f"--output-tokens {self.output_tokens}: must be in 2 .. 4096")
        if not 1 <= self.rounds <= 100:
            raise ConfigError(f"--rounds {self.rounds}: must be in 1 .. 100")


@dataclass(slots=True)
class Figure:
    """Tokens per second of one way at one shape: medians over the rounds."""

    way: str
    batch: int
    prompt_tokens: int
    decode: float
    prefill: float
    agree: float  # part of the greedy tokens that are ours


@dataclass(slots=True)
class ModelReport:
    """All figures, the machine's facts, and why a way has none."""

    machine: dict[str, Any] = field(default_factory=facts)
    figures: list[Figure] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "machine": self.machine,
            "figures": [asdict(figure) for figure in self.figures],
            "absent": self.absent,
        }


def run(plan: ModelPlan, progress: Callable[[str], None]) -> ModelReport:
    """Measure. Raises ConfigError: the checkpoint; RuntimeError: our own engine failed."""
    plan.check()
    report = ModelReport()
    with tempfile.TemporaryDirectory(prefix="xds-bench-") as scratch:
        folder = plan.model or Path(scratch) / "model"
        if plan.model is None:
            write_random(folder)
        load_config(folder)
        runners: dict[str, Runner] = {}
        try:
            for way in WAYS:
                if not way.name.startswith((OURS, *plan.peers)):
                    continue
                progress(f"starting {way.name}")
                try:
                    runners[way.name] = Runner(way, folder, Path(scratch))
                except EngineMissing as error:
                    if way.name == OURS:
                        raise RuntimeError(str(error)) from error
                    report.absent[way.name] = str(error)
            for prompt in plan.prompt:
                for batch in plan.batch:
                    progress(f"batch {batch}, prompts of {prompt} tokens")
                    report.figures += _measure(runners, plan, batch, prompt)
        finally:
            for runner in runners.values():
                runner.close()
    return report


class EngineMissing(Exception):
    """An engine is not installed, or does not start."""


class Runner:
    """The processes of one way."""

    def __init__(self, way: Way, folder: Path, scratch: Path) -> None:
        self.way = way
        for module in way.modules:
            if importlib.util.find_spec(module) is None:
                raise EngineMissing(f"{module} is not installed")
        _prepare(way, folder, scratch)
        command = [
            sys.executable,
            "-m",
            f"services.bench.engines.{way.engine}",
            *way.arguments(folder, scratch),
        ]
        self._processes = [self._start(command) for _ in range(way.processes)]
        try:
            for process in self._processes:
                self._line(process)
        except EngineMissing:
            self.close()
            raise

    def _start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env=_environment(self.way.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise EngineMissing(f"{self.way.name} ended with exit code {process.wait(10)}")
        return line

    def run(self, task: dict[str, int]) -> list[dict[str, Any]]:
        """Run a task, split over the processes; return each one's answer."""
        active = self._processes[: task["batch"]]
        bounds = [task["batch"] * i // len(active) for i in range(len(active) + 1)]
        for process, begin, end in zip(active, bounds, bounds[1:], strict=False):
            assert process.stdin is not None
            process.stdin.write(json.dumps({**task, "begin": begin, "end": end}) + "\n")
            process.stdin.flush()
        return [json.loads(self._line(process)) for process in active]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()


def _measure(runners: dict[str, Runner], plan: ModelPlan, batch: int, prompt: int) -> list[Figure]:
    task = {"batch": batch, "prompt_tokens": prompt, "output_tokens": plan.output_tokens, "seed": 1}
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in runners}
    for _ in range(plan.rounds):
        for name, runner in runners.items():
            found[name].append(runner.run(task))
    ours = _tokens(found[OURS][0])
    return [_figure(name, batch, prompt, rounds, ours) for name, rounds in found.items()]


def _figure(
    name: str, batch: int, prompt: int, rounds: list[list[dict[str, Any]]], ours: list[int]
) -> Figure:
    decode = [
        sum(len(answer["token_ids"]) / median(answer["steps_s"]) for answer in answers) for answers in rounds
    ]
    prefill = [batch * prompt / max(answer["prefill_s"] for answer in answers) for answers in rounds]
    theirs = _tokens(rounds[0])
    agree = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
    return Figure(name, batch, prompt, median(decode), median(prefill), agree)


def _tokens(answers: list[dict[str, Any]]) -> list[int]:
    return [token for answer in answers for row in answer["token_ids"] for token in row]


def _prepare(way: Way, folder: Path, scratch: Path) -> None:
    """Write the checkpoint in the form that the way needs. Raises EngineMissing: it cannot be."""
    if way.engine == "llama_cpp" and not (scratch / GGUF_NAME).exists():
        module = "services.bench.gguf_file"
        _call([sys.executable, "-m", module, str(folder), str(scratch / GGUF_NAME)])
    if way.int8:
        token_ids = np.random.default_rng(0).integers(0, load_config(folder).vocab_size, (4, 64))
        try:
            quantize(folder, scratch / INT8_NAME, token_ids, Recipe(compensate=False), lambda *_: None)
        except ConfigError as error:
            raise EngineMissing(str(error)) from error


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, env=_environment(1), capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineMissing((done.stderr.strip().splitlines() or ["it failed"])[-1])


def _environment(threads: int) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    count = str(threads)
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}


def render(report: ModelReport) -> str:
    """Return the tables: tokens/s, and in brackets how many times ours."""
    shapes = list(dict.fromkeys((f.batch, f.prompt_tokens) for f in report.figures))
    names = list(dict.fromkeys(f.way for f in report.figures))
    by_place = {(f.way, f.batch, f.prompt_tokens): f for f in report.figures}
    parts = []
    for title in ("decode", "prefill"):
        header = [f"{batch} x {prompt}" for batch, prompt in shapes]
        rows = []
        for name in names:
            cells = []
            for shape in shapes:
                figure, ours = by_place[(name, *shape)], by_place[(OURS, *shape)]
                ratio = "" if name == OURS else f" ({getattr(figure, title) / getattr(ours, title):.2f})"
                cells.append(f"{getattr(figure, title):,.0f}{ratio}")
            rows.append((name, cells))
        parts.append(_table(f"{title}, tokens/s (relative to ours), batch x prompt", header, rows))
    differ = [f for f in report.figures if f.agree < 1]
    if differ:
        lines = [f"{f.way}, {f.batch} x {f.prompt_tokens}: {f.agree:.1%}" for f in differ]
        parts.append("greedy tokens equal to ours (all others: 100%)\n" + "\n".join(lines))
    parts += [f"{name}: missing: {why}" for name, why in report.absent.items()]
    return "\n\n".join(parts) + "\n"


def _table(title: str, header: list[str], rows: list[tuple[str, list[str]]]) -> str:
    first = max(len(name) for name, _ in rows)
    widths = [max(len(header[i]), *(len(cells[i]) for _, cells in rows)) for i in range(len(header))]
    lines = [title, " " * first + "".join(f"  {h:>{w}}" for h, w in zip(header, widths, strict=True))]
    for name, cells in rows:
        lines.append(f"{name:<{first}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)
