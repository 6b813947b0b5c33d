"""safetensors folders: what is mapped, and what damage is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bus.errors import ConfigError
from services.model import checkpoint as checkpoint_module
from services.model.block_scaled import BlockScaled
from services.model.checkpoint import Checkpoint, TensorSpec, merge_runs
from services.model.int8 import Int8Matrix
from services.model.model_config import Fp8Config, Int8Config
from services.model.safetensors_header import read_header

DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "int64": "I64",
    "uint8": "F8_E4M3",
    "int8": "I8",
}
BLOCKS = Fp8Config(block_rows=2, block_columns=4)


def write(path: Path, tensors: dict[str, npt.NDArray[Any]], **changes: Any) -> None:
    """Write a safetensors file; `changes` replaces header entries."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header | changes).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def shard(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def floats(*shape: int) -> npt.NDArray[np.float32]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_tensors_come_back_as_stored(tmp_path: Path) -> None:
    bf16 = np.array([0x3F80, 0xC000], dtype=np.uint16)
    write(tmp_path / "model.safetensors", {"a": floats(3, 5), "b": floats(4).astype(np.float16), "c": bf16})
    progress: list[tuple[int, int]] = []
    specs = [TensorSpec("a", (3, 5)), TensorSpec("b", (4,)), TensorSpec("c", (2,))]
    weights = Checkpoint.open(tmp_path).load(specs, lambda done, total: progress.append((done, total)))
    np.testing.assert_array_equal(weights.matrix("a"), floats(3, 5))
    assert weights.matrix("b").dtype == np.float16
    np.testing.assert_array_equal(weights.vector("b"), floats(4))
    np.testing.assert_array_equal(weights.vector("c"), [1.0, -2.0])
    assert weights.optional_vector("d") is None
    assert weights.tensor_names == ("a", "b", "c")
    assert weights.held_bytes == 60 + 8 + 4
    assert progress == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="read-only"):
        weights.matrix("a")[0, 0] = 1.0


def test_only_the_pages_needed_are_mapped_and_neighbours_share(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full((64, 1024), i, dtype=np.float32) for i in range(8)}
    write(tmp_path / "model.safetensors", tensors)
    wanted = [TensorSpec(name, (64, 1024)) for name in ("t1", "t2", "t6")]
    weights = Checkpoint.open(tmp_path).load(wanted)
    assert all((weights.matrix(f"t{i}") == i).all() for i in (1, 2, 6))
    assert 3 * 64 * 4096 <= weights.mapped_bytes <= 3 * 64 * 4096 + 4 * 4096
    assert merge_runs([(8, 9), (0, 4), (4, 6), (5, 7), (7, 7)]) == [(0, 7), (8, 9)]


def test_one_entry_of_a_stacked_tensor(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"w": floats(4, 2, 3)})
    weights = Checkpoint.open(tmp_path).load([TensorSpec("w", (2, 3), 1), TensorSpec("w", (2, 3), 3)])
    np.testing.assert_array_equal(weights.array("w", 3), floats(4, 2, 3)[3])
    assert weights.held_bytes == 48
    with pytest.raises(ConfigError, match=r"tensor w has shape \[4, 2, 3\]"):
        Checkpoint.open(tmp_path).load([TensorSpec("w", (2, 3), 4)])


def test_a_mapping_outlives_its_checkpoint_and_goes_with_its_arrays(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"w": np.zeros((600, 1024), dtype=np.float32)})
    path = str((tmp_path / "model.safetensors").resolve())
    matrix: npt.NDArray[Any] | None
    matrix = Checkpoint.open(tmp_path).load([TensorSpec("w", (600, 1024))]).matrix("w")
    assert path in Path("/proc/self/maps").read_text()
    assert not matrix.any()
    del matrix
    assert path not in Path("/proc/self/maps").read_text()


def test_shards(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", {"a": floats(2)})
    write(tmp_path / "two.safetensors", {"b": floats(3)})
    shard(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    weights = Checkpoint.open(tmp_path).load([TensorSpec("a", (2,)), TensorSpec("b", (3,))])
    np.testing.assert_array_equal(weights.vector("b"), floats(3))

    shard(tmp_path, {"a": "one.safetensors", "b": "three.safetensors"})
    with pytest.raises(ConfigError, match=r"three\.safetensors: shard is missing"):
        Checkpoint.open(tmp_path)
    shard(tmp_path, {"c": "one.safetensors"})
    with pytest.raises(ConfigError, match=r"one\.safetensors: tensor c is missing"):
        Checkpoint.open(tmp_path)
    for name in ("../one.safetensors", "", "..", 5):
        shard(tmp_path, {"a": name})
        with pytest.raises(ConfigError, match="must be a plain file name"):
            Checkpoint.open(tmp_path)
    shard(tmp_path, {})
    with pytest.raises(ConfigError, match="weight_map"):
        Checkpoint.open(tmp_path)


def test_what_does_not_fit_the_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    write(tmp_path / "model.safetensors", {"a": floats(2, 3), "ids": np.zeros(2, dtype=np.int64)})
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ConfigError, match="tensor b is missing"):
        checkpoint.load([TensorSpec("b", (2, 3))])
    with pytest.raises(ConfigError, match=r"tensor a has shape \[2, 3\], config\.json says \[3, 2\]"):
        checkpoint.load([TensorSpec("a", (3, 2))])
    with pytest.raises(ConfigError, match="tensor ids is I64; supported are F32"):
        checkpoint.load([TensorSpec("ids", (2,))])


def test_eight_bit_matrices_come_with_their_factors(tmp_path: Path) -> None:
    values = np.arange(15, dtype=np.uint8).reshape(3, 5)
    tensors = {"a.weight": values, "a.weight_scale_inv": np.full((2, 2), 0x3F80, dtype=np.uint16)}
    write(tmp_path / "model.safetensors", tensors)
    spec = TensorSpec("a.weight", (3, 5), quantisable=True)
    checkpoint = Checkpoint.open(tmp_path, BLOCKS)
    assert checkpoint.check(spec) == ["a.weight", "a.weight_scale_inv"]
    weights = checkpoint.load([spec])
    matrix = weights.matrix("a.weight")
    assert isinstance(matrix, BlockScaled)
    np.testing.assert_array_equal(matrix.values, values)
    np.testing.assert_array_equal(matrix.scale, np.ones((2, 2)))
    assert (weights.tensor_names, weights.held_bytes) == (("a.weight",), 15 + 16)

    with pytest.raises(ConfigError, match=r"a\.weight is F8_E4M3: config\.json has no quantization_config"):
        Checkpoint.open(tmp_path).load([spec])
    with pytest.raises(ConfigError, match=r"a\.weight is F8_E4M3; supported are F32, F16, BF16$"):
        checkpoint.load([TensorSpec("a.weight", (3, 5))])
    wide = Fp8Config(block_rows=2, block_columns=2)
    with pytest.raises(ConfigError, match=r"_scale_inv has shape \[2, 2\], config\.json says \[2, 3\]"):
        Checkpoint.open(tmp_path, wide).load([spec])
    eight_bit_factors = {"a.weight": values, "a.weight_scale_inv": np.zeros((2, 2), dtype=np.uint8)}
    write(tmp_path / "model.safetensors", eight_bit_factors)
    with pytest.raises(ConfigError, match=r"a\.weight_scale_inv is F8_E4M3; supported are F32, F16, BF16$"):
        Checkpoint.open(tmp_path, BLOCKS).load([spec])
    write(tmp_path / "model.safetensors", {"a.weight": values})
    with pytest.raises(ConfigError, match=r"tensor a\.weight_scale_inv is missing"):
        Checkpoint.open(tmp_path, BLOCKS).check(spec)


@pytest.mark.parametrize("where", [0, 11, 299])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = floats(300)
    tensor[where] = np.nan
    write(tmp_path / "model.safetensors", {"a": floats(4), "b": tensor})
    specs = [TensorSpec("a", (4,)), TensorSpec("b", (300,))]
    with pytest.raises(ConfigError, match=r"model\.safetensors: tensor b holds NaN or infinity"):
        Checkpoint.open(tmp_path).load(specs)
    monkeypatch.setattr(checkpoint_module, "FULL_CHECK_BYTES", 64)
    monkeypatch.setattr(checkpoint_module, "EDGE_BYTES", 40)
    if where == 11:  # the middle of a tensor of a checkpoint too large to be read at start
        Checkpoint.open(tmp_path).load(specs)
        return
    with pytest.raises(ConfigError, match="tensor b holds NaN or infinity"):
        Checkpoint.open(tmp_path).load(specs)


def test_a_bad_factor_or_entry_is_refused(tmp_path: Path) -> None:
    scale = np.array([[1.0, np.inf]], dtype=np.float32)
    tensors = {"a.weight": np.zeros((1, 5), dtype=np.uint8), "a.weight_scale_inv": scale}
    stacked = floats(3, 2, 2)
    stacked[1, 0, 0] = -np.inf
    write(tmp_path / "model.safetensors", {**tensors, "s": stacked})
    with pytest.raises(ConfigError, match=r"tensor a\.weight_scale_inv holds NaN or infinity"):
        Checkpoint.open(tmp_path, BLOCKS).load([TensorSpec("a.weight", (1, 5), quantisable=True)])
    with pytest.raises(ConfigError, match=r"tensor s\[1\] holds NaN or infinity"):
        Checkpoint.open(tmp_path).load([TensorSpec("s", (2, 2), 0), TensorSpec("s", (2, 2), 1)])


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}, "truncated"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "8 bytes do not make F32"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "shape"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "shape"),
        ({"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}, "shape"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 2**70]}, "data_offsets"),
        ({"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}, "unknown dtype 'Q4'"),
        ({"shape": [2], "data_offsets": [0, 8]}, "unknown dtype None"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "overlaps"),
        ([], "must be an object"),
    ],
)
def test_damaged_headers(tmp_path: Path, entry: object, text: str) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"a": floats(2), "b": floats(2)}, b=entry)
    with pytest.raises(ConfigError, match=text) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_files_that_are_not_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for content in (b"", b"\x01\x02", (2**63).to_bytes(8, "little"), (9).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="its header does not fit"):
            read_header(path)
    for content, text in (
        (b"{]", "not readable"),
        (b"[]", "must be a JSON object"),
        (b"[" * 50_000, "not readable"),
    ):
        path.write_bytes(len(content).to_bytes(8, "little") + content)
        with pytest.raises(ConfigError, match=text):
            read_header(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"a": floats(2), "b": floats(5)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError):
            read_header(path)


def test_int8_matrices_come_with_a_factor_per_row(tmp_path: Path) -> None:
    q = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    scale = np.array([[0.5], [0.25], [0]], np.float32)
    write(tmp_path / "model.safetensors", {"a.weight": q, "a.weight_scale": scale})
    spec = TensorSpec("a.weight", (3, 4), quantisable=True)
    checkpoint = Checkpoint.open(tmp_path, Int8Config())
    assert checkpoint.check(spec) == ["a.weight", "a.weight_scale"]
    matrix = checkpoint.load([spec]).matrix("a.weight")
    assert isinstance(matrix, Int8Matrix)
    np.testing.assert_array_equal(matrix.widen(), q * scale)
    with pytest.raises(ConfigError, match=r"a\.weight is I8: config\.json has no quantization_config"):
        Checkpoint.open(tmp_path, BLOCKS).load([spec])
    with pytest.raises(ConfigError, match=r"a\.weight is I8; supported are F32, F16, BF16$"):
        checkpoint.load([TensorSpec("a.weight", (3, 4))])
    write(tmp_path / "model.safetensors", {"a.weight": q, "a.weight_scale": scale[:2]})
    with pytest.raises(ConfigError, match=r"a\.weight_scale has shape \[2, 1\]"):
        Checkpoint.open(tmp_path, Int8Config()).load([spec])
    write(tmp_path / "model.safetensors", {"a.weight": q, "a.weight_scale": np.full_like(scale, np.nan)})
    with pytest.raises(ConfigError, match=r"a\.weight_scale holds NaN"):
        Checkpoint.open(tmp_path, Int8Config()).load([spec])
