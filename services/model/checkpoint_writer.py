"""Writing a Hugging Face checkpoint's tensors, one file or sharded, without holding more than one shard.

1. `add` collects tensors; when a shard is full it is written under a temporary name.
2. `finish` gives the shards their names, with an index when there are several. Until then the folder has no checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SHARD_BYTES = 2 * 1024**3
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8"}


class CheckpointWriter:
    """Collects tensors into the safetensors files of one folder.

    Args:
        folder: exists; holds no `*.safetensors` yet.
        shard_bytes: size from which on a shard is written.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._open: dict[str, tuple[str, tuple[int, ...], npt.NDArray[Any]]] = {}
        self._open_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, array: npt.NDArray[Any]) -> None:
        """Take a tensor; it must not change before its shard is written. uint16 stands for bfloat16.

        Raises:
            ValueError: the name was added before, or the type has no name in the format.
        """
        kind = DTYPE_NAMES.get(array.dtype.name)
        if kind is None:
            raise ValueError(f"tensor {name}: {array.dtype.name} has no name in safetensors here")
        self.add_raw(name, kind, array.shape, array)

    def add_raw(self, name: str, dtype: str, shape: tuple[int, ...], data: npt.NDArray[Any]) -> None:
        """Take a tensor as stored elsewhere: `dtype` is the format's name, `data` its bytes in any shape.

        Raises:
            ValueError: the name was added before.
        """
        if name in self._open or any(name in shard for shard in self._shards):
            raise ValueError(f"tensor {name}: was added before")
        self._open[name] = (dtype, shape, data)
        self._open_bytes += data.nbytes
        self.total_bytes += data.nbytes
        if self._open_bytes >= self._shard_bytes:
            self._write_shard()

    def finish(self) -> list[Path]:
        """Write what is left and name the files; return them."""
        if self._open or not self._shards:
            self._write_shard()
        if len(self._shards) == 1:
            return [self._partial(0).rename(self._folder / "model.safetensors")]
        count = len(self._shards)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        paths = [self._partial(i).rename(self._folder / name) for i, name in enumerate(names)]
        weight_map = {tensor: names[i] for i, shard in enumerate(self._shards) for tensor in shard}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        return paths

    def _partial(self, index: int) -> Path:
        return self._folder / f".shard-{index}.partial"

    def _write_shard(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (dtype, shape, array) in self._open.items():
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [at, at + array.nbytes],
            }
            at += array.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 64)  # tensors of whole lines begin on one
        with self._partial(len(self._shards)).open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, _, array in self._open.values():
                file.write(np.ascontiguousarray(array).data)
        self._shards.append(list(self._open))
        self._open, self._open_bytes = {}, 0
