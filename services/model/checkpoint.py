"""Hugging Face checkpoints in safetensors layout, one file or sharded, mapped and never copied.

1. `Checkpoint.open` reads the index (if any) and every header, and checks all of it against the files' sizes.
2. `Checkpoint.load` takes the tensors that a role needs, checks presence, type and shape, and maps only the
   pages that hold them; neighbouring tensors share a mapping. An attention worker so maps no expert weight.
3. It looks for NaN and infinity in what it has mapped: everywhere up to `FULL_CHECK_BYTES`, above that in the first
   and last `EDGE_BYTES` of each tensor (vectors, gates and factors so still whole), since a start must not read
   hundreds of gigabytes.
4. Matrices stay in the stored type; vectors (norms, biases) and the factors of 8-bit matrices are small and become
   float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bus.errors import ConfigError
from services.model import numerics
from services.model.block_scaled import BlockScaled, scale_shape
from services.model.file_map import map_range, page_run
from services.model.int8 import Int8Matrix
from services.model.model_config import Fp8Config, Int8Config
from services.model.safetensors_header import StoredTensor, read_headers

E4M3, INT8 = "F8_E4M3", "I8"
NUMPY_DTYPES: dict[str, npt.DTypeLike] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    E4M3: np.uint8,
    INT8: np.int8,
}
SCALE_SUFFIXES = {E4M3: "_scale_inv", INT8: "_scale"}  # of the name of a quantised tensor's factors

FULL_CHECK_BYTES = 2**30
EDGE_BYTES = 2**20

Progress = Callable[[int, int], None]  # (tensors done, tensors in total)
Key = tuple[str, int | None]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a role needs.

    `index` picks one entry of a stacked tensor; `shape` is that entry's. `quantisable`: it may be stored as e4m3
    with a factor per block, the factors beside it under the name + "_scale_inv", or in INT8 with a factor per row,
    under the name + "_scale".
    """

    name: str
    shape: tuple[int, ...]
    index: int | None = None
    quantisable: bool = False


class Weights:
    """The mapped tensors of one role."""

    def __init__(self, tensors: dict[Key, numerics.AnyWeight], mapped_bytes: int) -> None:
        self._tensors = tensors
        self.mapped_bytes = mapped_bytes

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names held, sorted; a stacked tensor of which entries are held appears once."""
        return tuple(sorted({name for name, _ in self._tensors}))

    @property
    def held_bytes(self) -> int:
        """Return the bytes of all tensors held."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def replaced(self, tensors: Mapping[str, numerics.AnyWeight]) -> Weights:
        """Return these weights with those tensors in place of the ones of the same name."""
        return Weights(
            self._tensors | {(name, None): tensor for name, tensor in tensors.items()}, self.mapped_bytes
        )

    def matrix(self, name: str) -> numerics.AnyWeight:
        """Return a tensor as stored, read only; bfloat16 as uint16, 8-bit ones with their factors."""
        return self._tensors[name, None]

    def array(self, name: str, index: int | None = None) -> npt.NDArray[Any]:
        """Return a tensor that is not quantisable as stored, read only; bfloat16 as uint16."""
        tensor = self._tensors[name, index]
        assert isinstance(tensor, np.ndarray)
        return tensor

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """Return a float32 copy."""
        return numerics.widen(self.array(name))

    def optional_vector(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return a float32 copy, or None if it was not asked for."""
        return self.vector(name) if (name, None) in self._tensors else None


class Checkpoint:
    """All tensors of a folder, by name. Nothing is mapped before `load`."""

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, StoredTensor],
        quantization: Fp8Config | Int8Config | None = None,
    ) -> None:
        self.folder = folder
        self.tensors = tensors
        self._quantization = quantization

    @classmethod
    def open(cls, folder: str | Path, quantization: Fp8Config | Int8Config | None = None) -> Checkpoint:
        """Read index and headers; `quantization` is what `config.json` says of 8-bit weights.

        Raises:
            ConfigError: no checkpoint there, a shard is missing, a file is truncated or malformed.
        """
        return cls(Path(folder), read_headers(Path(folder)), quantization)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def check(self, spec: TensorSpec) -> list[str]:
        """Return the names of the stored tensors that `spec` needs.

        Raises:
            ConfigError: one is missing, or of another shape or type than expected.
        """
        stored = self._locate(spec)
        if stored.dtype not in SCALE_SUFFIXES:
            return [spec.name]
        scale = self._scale_spec(spec, stored)
        self._locate(scale)
        return [spec.name, scale.name]

    def load(self, specs: Sequence[TensorSpec], progress: Progress | None = None) -> Weights:
        """Map the tensors asked for.

        Raises:
            ConfigError: one is missing, of another shape or type than expected, or holds NaN or infinity.
            ResourceError: the system refuses the mapping.
        """
        ranges: dict[Key, StoredTensor] = {}
        scales: dict[Key, Key] = {}
        for spec in specs:
            key = (spec.name, spec.index)
            ranges[key] = self._locate(spec)
            if ranges[key].dtype in SCALE_SUFFIXES:
                scale = self._scale_spec(spec, ranges[key])
                scales[key] = (scale.name, None)
                ranges[scales[key]] = self._locate(scale)
        arrays, mapped_bytes = _map_all(ranges, progress)
        _check_finite(arrays, ranges)
        return Weights(self._join_scales(arrays, scales), mapped_bytes)

    def _join_scales(
        self, arrays: dict[Key, npt.NDArray[Any]], scales: dict[Key, Key]
    ) -> dict[Key, numerics.AnyWeight]:
        tensors: dict[Key, numerics.AnyWeight] = {**arrays}
        for key, scale_key in scales.items():
            scale = numerics.widen(arrays[scale_key])
            if isinstance(self._quantization, Fp8Config):
                rows, columns = self._quantization.block_rows, self._quantization.block_columns
                tensors[key] = BlockScaled(arrays[key], scale, rows, columns)
            else:
                tensors[key] = Int8Matrix(arrays[key], scale.reshape(-1))
            del tensors[scale_key]
        return tensors

    def _scale_spec(self, spec: TensorSpec, stored: StoredTensor) -> TensorSpec:
        quantization = self._quantization
        if not isinstance(quantization, Fp8Config if stored.dtype == E4M3 else Int8Config):
            rule = "config.json has no quantization_config that says how to read it"
            raise ConfigError(f"{stored.path}: tensor {spec.name} is {stored.dtype}: {rule}")
        shape = (spec.shape[0], 1)
        if isinstance(quantization, Fp8Config):
            shape = scale_shape(spec.shape, quantization.block_rows, quantization.block_columns)
        return TensorSpec(spec.name + SCALE_SUFFIXES[stored.dtype], shape)

    def _locate(self, spec: TensorSpec) -> StoredTensor:
        stored = self.tensors.get(spec.name)
        if stored is None:
            raise ConfigError(f"{self.folder}: tensor {spec.name} is missing")
        supported = [dtype for dtype in NUMPY_DTYPES if spec.quantisable or dtype not in SCALE_SUFFIXES]
        if stored.dtype not in supported:
            raise ConfigError(
                f"{stored.path}: tensor {spec.name} is {stored.dtype}; supported are {', '.join(supported)}"
            )
        shape = stored.shape if spec.index is None else stored.shape[1:]
        if shape != spec.shape or (spec.index is not None and spec.index >= stored.shape[0]):
            wanted = spec.shape if spec.index is None else (f"> {spec.index}", *spec.shape)
            raise ConfigError(
                f"{stored.path}: tensor {spec.name} has shape {list(stored.shape)}, "
                f"config.json says {list(wanted)}"
            )
        if spec.index is None:
            return stored
        entry_bytes = (stored.end - stored.start) // stored.shape[0]
        start = stored.start + spec.index * entry_bytes
        return StoredTensor(stored.path, stored.dtype, shape, start, start + entry_bytes)


def merge_runs(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that touch or overlap; sorted."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(runs):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def _map_all(
    ranges: dict[Key, StoredTensor], progress: Progress | None
) -> tuple[dict[Key, npt.NDArray[Any]], int]:
    """Return the arrays, views of shared mappings, and the bytes mapped."""
    arrays: dict[Key, npt.NDArray[Any]] = {}
    mapped_bytes = 0
    for path in sorted({stored.path for stored in ranges.values()}):
        here = [(key, stored) for key, stored in ranges.items() if stored.path == path]
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start, end in merge_runs(page_run(stored.start, stored.end) for _, stored in here):
                run = map_range(fd, start, end)
                mapped_bytes += end - start
                for key, stored in here:
                    if start <= stored.start and stored.end <= end:
                        arrays[key] = _view(run, start, stored)
                        if progress is not None:
                            progress(len(arrays), len(ranges))
        finally:
            os.close(fd)
    return arrays, mapped_bytes


def _view(run: npt.NDArray[np.uint8], run_start: int, stored: StoredTensor) -> npt.NDArray[Any]:
    piece = run[stored.start - run_start : stored.end - run_start]
    return piece.view(NUMPY_DTYPES[stored.dtype]).reshape(stored.shape)


def _check_finite(arrays: dict[Key, npt.NDArray[Any]], ranges: dict[Key, StoredTensor]) -> None:
    in_full = sum(array.nbytes for array in arrays.values()) <= FULL_CHECK_BYTES
    for key, array in arrays.items():
        flat = array.reshape(-1)
        edge = EDGE_BYTES // array.itemsize
        pieces = [flat] if in_full or flat.size <= 2 * edge else [flat[:edge], flat[-edge:]]
        if not all(numerics.all_finite(piece) for piece in pieces):
            name, index = key
            entry = "" if index is None else f"[{index}]"
            raise ConfigError(f"{ranges[key].path}: tensor {name}{entry} holds NaN or infinity")
