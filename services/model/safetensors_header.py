"""The headers of safetensors files: which tensor lies where. Nothing is mapped and no weight is read here.

A safetensors file is: u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data. Offsets count from
the end of the header. A checkpoint is one file, or several with an index that names the file of each tensor.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from bus.errors import ConfigError
from services.model.config_fields import read_json_object, unique_keys

HEADER_BYTES_MAX = 100 * 1024 * 1024
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: bytes start .. end of a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Read index (if any) and headers of a checkpoint folder.

    Raises:
        ConfigError: no checkpoint there, a shard is missing, a file is truncated or malformed.
    """
    if (folder / SINGLE_NAME).exists():
        return read_header(folder / SINGLE_NAME)
    if not (folder / INDEX_NAME).exists():
        raise ConfigError(f"{folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}")
    return _read_sharded(folder)


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
