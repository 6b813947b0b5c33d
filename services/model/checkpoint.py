"""Hugging Face checkpoints in safetensors layout, one file or sharded, mapped and never copied.

1. `Checkpoint.open` reads the index (if any) and every header, and checks all of it against the files' sizes.
2. `Checkpoint.load` takes the tensors that a role needs, checks presence, type and shape, and maps only the
   pages that hold them; neighbouring tensors share a mapping. An attention worker so maps no expert weight.
3. Matrices stay in the stored type; vectors (norms, biases) are small and become float32.

A safetensors file is: u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data. Offsets
count from
the end of the header.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
import numpy.typing as npt

from bus.errors import ConfigError
from services.model import numerics
from services.model.config_fields import read_json_object, unique_keys
from services.model.file_map import map_range, page_run

HEADER_BYTES_MAX = 100 * 1024 * 1024
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
NUMPY_DTYPES: dict[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}

Progress = Callable[[int, int], None]  # (tensors done, tensors in total)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a role needs. `index` picks one entry of a stacked tensor; `shape` is that entry's."""

    name: str
    shape: tuple[int, ...]
    index: int | None = None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: bytes start .. end of a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Weights:
    """The mapped tensors of one role."""

    def __init__(self, arrays: dict[tuple[str, int | None], npt.NDArray[Any]], mapped_bytes: int) -> None:
        self._arrays = arrays
        self.mapped_bytes = mapped_bytes

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names held, sorted; a stacked tensor of which entries are held appears once."""
        return tuple(sorted({name for name, _ in self._arrays}))

    @property
    def held_bytes(self) -> int:
        """Return the bytes of all tensors held."""
        return sum(array.nbytes for array in self._arrays.values())

    def matrix(self, name: str, index: int | None = None) -> npt.NDArray[Any]:
        """Return a tensor as stored, read only; bfloat16 as uint16."""
        return self._arrays[name, index]

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """Return a float32 copy."""
        return numerics.widen(self._arrays[name, None])

    def optional_vector(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return a float32 copy, or None if it was not asked for."""
        return self.vector(name) if (name, None) in self._arrays else None


class Checkpoint:
    """All tensors of a folder, by name. Nothing is mapped before `load`."""

    def __init__(self, folder: Path, tensors: dict[str, StoredTensor]) -> None:
        self.folder = folder
        self.tensors = tensors

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read index and headers.

        Raises:
            ConfigError: no checkpoint there, a shard is missing, a file is truncated or malformed.
        """
        folder = Path(folder)
        if (folder / SINGLE_NAME).exists():
            return cls(folder, read_header(folder / SINGLE_NAME))
        if not (folder / INDEX_NAME).exists():
            raise ConfigError(f"{folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}")
        return cls(folder, _read_sharded(folder))

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def load(self, specs: Sequence[TensorSpec], progress: Progress | None = None) -> Weights:
        """Map the tensors asked for.

        Raises:
            ConfigError: one is missing, of another shape, or of a type that is not float32, float16 or
                bfloat16.
            ResourceError: the system refuses the mapping.
        """
        ranges = {(spec.name, spec.index): self._locate(spec) for spec in specs}
        arrays: dict[tuple[str, int | None], npt.NDArray[Any]] = {}
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
        return Weights(arrays, mapped_bytes)

    def _locate(self, spec: TensorSpec) -> StoredTensor:
        stored = self.tensors.get(spec.name)
        if stored is None:
            raise ConfigError(f"{self.folder}: tensor {spec.name} is missing")
        if stored.dtype not in NUMPY_DTYPES:
            supported = ", ".join(NUMPY_DTYPES)
            raise ConfigError(
                f"{stored.path}: tensor {spec.name} is {stored.dtype}; supported are {supported}"
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


def _view(run: npt.NDArray[np.uint8], run_start: int, stored: StoredTensor) -> npt.NDArray[Any]:
    piece = run[stored.start - run_start : stored.end - run_start]
    return piece.view(NUMPY_DTYPES[stored.dtype]).reshape(stored.shape)


def _read_sharded(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX_NAME
    weight_map = read_json_object(index, HEADER_BYTES_MAX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: weight_map must be an object that names a file per tensor")
    headers: dict[str, dict[str, StoredTensor]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\0" in shard:
            raise ConfigError(f"{index}: tensor {name}: {shard!r} must be a plain file name")
        if shard not in headers:
            if not (folder / shard).is_file():
                raise ConfigError(f"{folder / shard}: shard is missing; {INDEX_NAME} names it for {name}")
            headers[shard] = read_header(folder / shard)
        if name not in headers[shard]:
            raise ConfigError(f"{folder / shard}: tensor {name} is missing; {INDEX_NAME} says it is here")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read and check the header of one safetensors file.

    Raises:
        ConfigError: unreadable, truncated or malformed; the text names the file and the tensor.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > min(HEADER_BYTES_MAX, file_bytes - 8):
                raise ConfigError(
                    f"{path}: truncated or not safetensors: its header does not fit in the file"
                )
            header = json.loads(file.read(header_bytes), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as safetensors: {error}") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: the safetensors header must be a JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    tensors = {name: _read_entry(path, name, entry, data_start, file_bytes) for name, entry in header.items()}
    _check_disjoint(path, tensors)
    return tensors


def _read_entry(path: Path, name: str, entry: object, data_start: int, file_bytes: int) -> StoredTensor:
    def refuse(reason: str) -> NoReturn:
        raise ConfigError(f"{path}: tensor {name}: {reason}")

    if not isinstance(entry, dict):
        refuse("header entry must be an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        refuse(f"unknown dtype {dtype!r}")
    if not _are_counts(shape) or len(shape) > 8:
        refuse(f"shape {shape!r} must be a list of whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"data_offsets {offsets!r} must be [begin, end]")
    start, end = data_start + offsets[0], data_start + offsets[1]
    if end > file_bytes:
        refuse(f"ends at byte {end}, but the file has {file_bytes}: truncated")
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - start:
        refuse(f"{end - start} bytes do not make {dtype} of shape {shape}")
    return StoredTensor(path, dtype, tuple(shape), start, end)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**60 for value in values)


def _check_disjoint(path: Path, tensors: dict[str, StoredTensor]) -> None:
    previous_end, previous_name = 0, ""
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start < previous_end:
            raise ConfigError(f"{path}: tensor {name}: overlaps {previous_name}")
        previous_end, previous_name = stored.end, name
