"""What is written is what `Checkpoint` reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.model.checkpoint import Checkpoint, TensorSpec
from services.model.checkpoint_writer import CheckpointWriter


@pytest.mark.parametrize(("shard_bytes", "num_files"), [(10_000, 1), (100, 3)])
def test_round_trip(tmp_path: Path, shard_bytes: int, num_files: int) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((5, 7), dtype=np.float32),
        "b": rng.standard_normal(60).astype(np.float16),
        "c": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "d.strided": rng.standard_normal((8, 6), dtype=np.float32)[::2, 1:4],
    }
    writer = CheckpointWriter(tmp_path, shard_bytes)
    for name, array in tensors.items():
        writer.add(name, array)
    assert not list(tmp_path.glob("*.safetensors"))
    assert len(writer.finish()) == num_files
    assert writer.total_bytes == sum(array.nbytes for array in tensors.values())
    weights = Checkpoint.open(tmp_path).load([TensorSpec(name, a.shape) for name, a in tensors.items()])
    for name, array in tensors.items():
        np.testing.assert_array_equal(weights.matrix(name), array)
    assert not list(tmp_path.glob(".shard*"))


def test_refusals(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.add("a", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="tensor a: was added before"):
        writer.add("a", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="tensor b: complex64 has no name"):
        writer.add("b", np.zeros(3, np.complex64))
    writer.add_raw("e", "F8_E4M3", (3,), np.zeros(3, np.uint8))
    writer.finish()
    assert Checkpoint.open(tmp_path).tensors["e"].dtype == "F8_E4M3"
