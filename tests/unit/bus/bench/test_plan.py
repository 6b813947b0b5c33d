from __future__ import annotations

from dataclasses import replace

import pytest

from bus.bench.collectives import moe_shapes
from bus.bench.plan import Plan
from bus.errors import ConfigError
from services import cli
from services.cli_bench import plan_of


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--sizes", "0"], "--sizes 0: must be in 1..67108864"),
        (["--sizes", "64", "-1"], "--sizes -1: must be in 1..67108864"),
        (["--ranks", "6"], "--ranks 6: must divide the 64 experts (--experts)"),
        (["--ranks", "1"], "--ranks 1: must be in 2..64"),
        (["--ranks", "3", "--experts", "9"], "--ranks 3: must be even"),
        (["--top-k", "65"], "--top-k 65: must be in 1..64"),
        (["--top-k", "8", "--experts", "4", "--ranks", "4"], "--top-k 8: must be in 1..4"),
        (["--hidden", "18"], "--hidden 18: must be a multiple of 4"),
        (["--batch", "0"], "--batch 0: must be in 1..4096"),
        (["--rounds", "0"], "--rounds 0: must be in 1..1000"),
        (["--only", "p2p,nothing"], "--only nothing: must be one of p2p, crowd, all-to-all, moe"),
        (["--peers", "ucx"], "--peers ucx: must be one of pipe, pyzmq, openmpi"),
        (["--plot", "x.pdf"], "--plot x.pdf: must end with .png or .svg"),
        (["--json", "/nonexistent/x.json"], "--json /nonexistent/x.json: /nonexistent is not a folder"),
    ],
)
def test_a_wrong_argument_is_one_line_and_code_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "bus", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"xds: {text}")


def plan(*arguments: str) -> Plan:
    options = cli._parser().parse_args(["bench", "bus", *arguments])
    return plan_of(cli._load(options), options)


def test_flags_and_settings_arrive() -> None:
    found = plan("--sizes", "1", "2", "--peers", "gloo,mpich", "--set", "xccl.spin_us=7", "--kinds", "int8")
    assert (found.sizes, found.peers, found.kinds, found.xccl.spin_us) == (
        (1, 2),
        ("gloo", "mpich"),
        ("int8",),
        7,
    )
    assert plan("--peers", "ours").peers == ()
    assert plan() == Plan()


def test_quick_shortens_what_was_not_named() -> None:
    found = plan("--quick", "--ranks", "8", "--sizes", "4096")
    assert (found.ranks, found.sizes) == ((8,), (4096,))
    assert found.rounds < Plan().rounds and found.batch == (1, 32)


def test_the_standard_plan_holds_every_shape_once() -> None:
    Plan().check()
    Plan().quick().check()
    shapes = list(moe_shapes(Plan(), 8))
    assert len(shapes) == len(set(shapes)) == 64
    assert len(list(moe_shapes(replace(Plan(), kinds=("int8",)), 4))) == 32


def test_a_plan_without_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="--sizes: needs at least one value"):
        replace(Plan(), sizes=()).check()
