from typing import Any

import numpy.typing as npt

_Array = npt.NDArray[Any]

def matmul_nt(x: _Array, w: _Array, out: _Array, /) -> None: ...
def matmul_nn(x: _Array, w: _Array, out: _Array, /) -> None: ...
def matmul_nt_e4m3(
    x: _Array, w: _Array, scale: _Array, block_rows: int, block_columns: int, out: _Array, /
) -> None: ...
def dequantise_e4m3(
    w: _Array, scale: _Array, block_rows: int, block_columns: int, out: _Array, /
) -> None: ...
def mlp(x: _Array, gate: _Array, up: _Array, down: _Array, out: _Array, /) -> None: ...
def rms_norm(x: _Array, weight: _Array, eps: float, out: _Array, /) -> None: ...
def silu_mul(gate: _Array, up: _Array, out: _Array, /) -> None: ...
def rope(x: _Array, cos: _Array, sin: _Array, interleaved: bool, out: _Array, /) -> None: ...
def combine(y: _Array, weights: _Array, residual: _Array, out: _Array, /) -> None: ...
def route(
    logits: _Array,
    bias: _Array | None,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    topk_idx: _Array,
    topk_weights: _Array,
    /,
) -> None: ...
def kv_store(
    x: _Array, cache: _Array, block_tables: _Array, seq_of_row: _Array, positions: _Array, /
) -> None: ...
def paged_attention(
    q: _Array,
    k: _Array,
    v: _Array,
    block_tables: _Array,
    seq_of_row: _Array,
    positions: _Array,
    scale: float,
    out: _Array,
    /,
) -> None: ...
def latent_store(
    x: _Array, rank: int, cache: _Array, block_tables: _Array, seq_of_row: _Array, positions: _Array, /
) -> None: ...
def latent_attention(
    q: _Array,
    rank: int,
    cache: _Array,
    block_tables: _Array,
    seq_of_row: _Array,
    positions: _Array,
    scale: float,
    out: _Array,
    /,
) -> None: ...
def instruction_set() -> str: ...
def select_instruction_set(name: str, /) -> None: ...
