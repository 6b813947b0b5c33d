"""What the documents say is true: their commands run, with the output shown, and what they name exists."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli import SERVICES, _parser
from tests.harness import console
from tests.harness.pod import Pod, running_pod

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
FOLDERS = ("services", "bus", "bus/bench")
DOCUMENTS = [README, *(ROOT / folder / "README.md" for folder in FOLDERS), ROOT / "CONTRIBUTING.md"]
STEPS_TIMEOUT_S = 120.0

# Commands that need another machine than a test has, or are what runs this test; other tests run most of them.
NOT_RUN = (
    "git ",
    "cd ",
    "docker",
    "make setup",
    "make test",
    "make chaos",
    "make parity",
    "make down",
    "pip ",
)
START = "make up"
DOCUMENTED_URL, DOCUMENTED_POD = "http://127.0.0.1:8000", "xds"
# With a slash, in backticks, and yet no file: names of operations, endpoints, settings, and of what only runs.
NOT_PATHS = re.compile(
    r"dispatch/combine|A2E/E2A|a2e/e2a|send/recv|/.*|ipc://.*|https?://.*|[a-z]+/I|expert/\d|\.\./.*"
)

_CODE = re.compile(r"`([^`\n]+)`")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#:]+)\)")
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")


@pytest.fixture(scope="module")
def demo_pod() -> Iterator[Pod]:
    """What `make up` starts once everything is built, on a port of its own."""
    if shutil.which("curl") is None:
        pytest.skip("the documents use curl, which this machine lacks")
    with running_pod("demo", verbose=False) as pod:
        yield pod


@pytest.fixture(scope="module")
def environ(demo_pod: Pod, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `xds` is this source tree's and means the pod."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "xds"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -P -m services.cli "$@"\n')
    script.chmod(0o755)
    found = demo_pod.environ()
    return {**found, "PATH": f"{folder}:{found['PATH']}"}


def typed(command: str, pod: Pod) -> str:
    """Return the command as a reader with this pod would type it."""
    command = command.replace(".venv/bin/xds", "xds").replace(DOCUMENTED_URL, pod.url)
    assert ":8000" not in command, f"another address than {DOCUMENTED_URL}: {command}"
    return command


# --------------------------------------------------------------------------- commands


def test_the_quickstart_starts_and_asks() -> None:
    commands = [step.command for block in console.blocks(README) for step in block]
    assert START in commands
    assert any(c.startswith("curl ") and "/v1/completions" in c for c in commands)


@pytest.mark.parametrize("number", range(len(console.blocks(README))))
def test_the_commands_of_a_block(number: int, demo_pod: Pod, environ: dict[str, str], tmp_path: Path) -> None:
    steps = [step for step in console.blocks(README)[number] if not step.command.startswith(NOT_RUN)]
    for step in steps:
        if step.command.startswith(START):
            assert step.command == START, "a start with arguments needs a pod of its own in this test"
            expect(step, demo_pod.log.read_text())
    steps = [step for step in steps if not step.command.startswith(START)]
    if not steps:
        return
    results = console.run(
        [typed(step.command, demo_pod) for step in steps], environ, tmp_path, STEPS_TIMEOUT_S
    )
    results = [(code, output.replace(demo_pod.name, DOCUMENTED_POD)) for code, output in results]
    everything = "".join(output for _, output in results)
    in_background = any(step.command.rstrip().endswith("&") for step in steps)
    for step, (code, output) in zip(steps, results, strict=True):
        assert code == 0, f"$ {step.command}\n{output}"
        expect(step, everything if in_background else output)
    demo_pod.wait_healthy()  # what the block has killed is back


def expect(step: console.Step, output: str) -> None:
    shown = [line for line in step.shown if not line.startswith(("@@", "setup:", "ready "))]
    missing = console.missing_lines(shown, output)
    assert not missing, f"$ {step.command}\nshows lines that do not occur: {missing}\n--- output\n{output}"


def test_no_output_is_left_to_fill_in() -> None:
    assert re.findall(r"@@\w+@@", README.read_text("utf-8")) == []


# --------------------------------------------------------------------------- names


def spans(document: Path) -> list[str]:
    """Return what stands in backticks, outside of blocks."""
    return _CODE.findall(_FENCE.sub("", document.read_text("utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    named = {span for span in spans(document) if "/" in span and _PATH.fullmatch(span)}
    paths = {name for name in named if not NOT_PATHS.fullmatch(name)} | set(
        _LINK.findall(document.read_text("utf-8"))
    )
    assert paths, "no path found: the test reads the document wrongly"
    assert sorted(p for p in paths if not ((ROOT / p).exists() or (document.parent / p).exists())) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_that_are_named_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", " ".join(commands_in(document))))
    assert named <= targets


def commands_in(document: Path) -> list[str]:
    return [*spans(document), *(step.command for block in console.blocks(document) for step in block)]


def test_commands_of_xds_that_are_named_exist() -> None:
    (choices,) = [a.choices for a in _parser()._actions if a.dest == "command"]
    assert choices is not None
    for document in DOCUMENTS:
        for text in commands_in(document):
            for line in re.findall(r"(?:^|\s|/)xds ([a-z]+)", text):
                assert line in choices, f"{document}: xds {line}"
    listed = next(span for span in spans(README) if span.startswith("xds up |"))
    named = {part.split()[0] for part in listed.removeprefix("xds ").split(" | ")}
    assert named == set(choices)


def test_every_service_has_a_row() -> None:
    table = (ROOT / "services/README.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(rows) == sorted(SERVICES)
