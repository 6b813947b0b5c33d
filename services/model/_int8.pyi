from typing import Any

import numpy.typing as npt

_Array = npt.NDArray[Any]

def matmul_nt(x: _Array, w: _Array, scale: _Array, out: _Array, /) -> None: ...
def mlp(
    x: _Array,
    gate: _Array,
    gate_scale: _Array,
    up: _Array,
    up_scale: _Array,
    down: _Array,
    down_scale: _Array,
    out: _Array,
    /,
) -> None: ...
def quantise_rows(x: _Array, q: _Array, scale: _Array, /) -> None: ...
def instruction_set() -> str: ...
def select_instruction_set(name: str, /) -> None: ...
