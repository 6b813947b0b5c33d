"""The paged KV cache of one DP group.

One block holds `block_tokens` token slots of every layer and is contiguous, so that a block can be moved as a
whole:

    buffer  [num_blocks][num_layers][ K: kv_heads x block_tokens x k_dim | V: kv_heads x block_tokens x v_dim
    ]

all float32. Grouped-query attention stores K and V. Latent attention stores one shared row per token, the
normalised latent followed by the rotated key part; its V is a view of the latent, so it has no V half.

Latent attention can also keep the latent in INT8 (`kv_cache_dtype` "int8"; paper section 4.5): the rotated part, whose
angles are sensitive to rounding, stays float32. A token's row is then, in bytes,

    [ latent: kv_lora_rank int8, padded to 4 | scale: float32 | rotated key: qk_rope_head_dim float32 ]

and a latent element is float32(q) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bus.config_rules import KV_CACHE_DTYPES
from bus.errors import ConfigError
from services.model.model_config import ModelConfig

if TYPE_CHECKING:
    from typing_extensions import Buffer

Float = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class KvSpec:
    """What one token occupies in one layer; v_dim counts stored floats, 0 when V is a view of K."""

    num_layers: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    v_view_dim: int  # leading part of K that serves as V, 0 when V is stored
    is_int8: bool = False  # that part of K is INT8 with a scale per token

    @classmethod
    def of(cls, config: ModelConfig, kv_cache_dtype: str = "auto") -> KvSpec:
        """Return the layout that a model needs.

        Raises:
            ConfigError: `kv_cache_dtype` is neither "auto" (float32) nor "int8", or the model has no latent for "int8".
        """
        if kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"attention.kv_cache_dtype = {kv_cache_dtype!r}: must be one of {', '.join(KV_CACHE_DTYPES)}"
            )
        layers, is_int8 = config.num_hidden_layers, kv_cache_dtype == "int8"
        if config.mla is not None:
            return cls(layers, 1, config.head_dim, 0, config.mla.kv_lora_rank, is_int8)
        if is_int8:
            rule = "needs latent attention (MLA)"
            raise ConfigError(
                f"attention.kv_cache_dtype = 'int8': {rule}, {config.model_type} has grouped-query attention"
            )
        return cls(layers, config.num_key_value_heads, config.head_dim, config.head_dim, 0)

    @property
    def bytes_per_token_layer(self) -> int:
        """Return the bytes of one token in one layer."""
        if self.is_int8:
            return -(-self.v_view_dim // 4) * 4 + SCALE_BYTES + 4 * (self.k_dim - self.v_view_dim)
        return 4 * self.num_kv_heads * (self.k_dim + self.v_dim)

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of one token in all layers."""
        return self.num_layers * self.bytes_per_token_layer


class KvCache:
    """Blocks over a buffer that the caller owns, or over memory of its own."""

    def __init__(
        self, spec: KvSpec, num_blocks: int, block_tokens: int, buffer: Buffer | None = None
    ) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"num_blocks {num_blocks} and block_tokens {block_tokens} must be positive")
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        num_bytes = num_blocks * block_tokens * spec.bytes_per_token
        flat = np.zeros(num_bytes // 4, np.float32) if buffer is None else _wrap(buffer, num_bytes)
        self.array: Float = flat.reshape(num_blocks, spec.num_layers, -1)
        if spec.is_int8:
            row_bytes = (num_blocks, spec.num_layers, block_tokens, spec.bytes_per_token_layer)
            self._rows: Bytes = flat.view(np.uint8).reshape(row_bytes).transpose(1, 0, 2, 3)
            return
        half = spec.num_kv_heads * block_tokens * spec.k_dim
        self._k = self._heads(self.array[:, :, :half], spec.k_dim)
        stored_v = self._heads(self.array[:, :, half:], spec.v_dim)
        self._v = self._k[..., : spec.v_view_dim] if spec.v_view_dim else stored_v

    def _heads(self, half: Float, dim: int) -> Float:
        """View [num_blocks, layers, width] as [layers, num_blocks, block_tokens, kv_heads, dim]."""
        kv_heads, tokens = self.spec.num_kv_heads, self.block_tokens
        view = half.reshape(self.num_blocks, self.spec.num_layers, kv_heads, tokens, dim)
        return view.transpose(1, 0, 3, 2, 4)

    def latent_rows(self, layer_idx: int) -> Bytes:
        """Return the rows of a layer of an INT8 cache, [num_blocks, block_tokens, bytes_per_token_layer], a view."""
        view: Bytes = self._rows[layer_idx]
        return view

    def k(self, layer_idx: int) -> Float:
        """Return K of a layer, [num_blocks, block_tokens, kv_heads, k_dim], a view."""
        view: Float = self._k[layer_idx]
        return view

    def v(self, layer_idx: int) -> Float:
        """Return V of a layer, [num_blocks, block_tokens, kv_heads, v_dim], a view."""
        view: Float = self._v[layer_idx]
        return view


def _wrap(buffer: Buffer, num_bytes: int) -> Float:
    flat: Bytes = np.frombuffer(memoryview(buffer).cast("B"), dtype=np.uint8)
    if flat.nbytes < num_bytes or not flat.flags.writeable or flat.ctypes.data % 4:
        raise ValueError(
            f"KV buffer of {flat.nbytes} bytes must be writable, aligned to 4 and hold {num_bytes} bytes"
        )
    return flat[:num_bytes].view(np.float32)
