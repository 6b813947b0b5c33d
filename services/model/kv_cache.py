"""The paged KV cache of one DP group.

One block holds `block_tokens` token slots of every layer and is contiguous, so that a block can be moved as a
whole:

    buffer  [num_blocks][num_layers][ K: kv_heads x block_tokens x k_dim | V: kv_heads x block_tokens x v_dim
    ]

all float32. Grouped-query attention stores K and V. Latent attention stores one shared row per token, the
normalised latent followed by the rotated key part; its V is a view of the latent, so it has no V half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from services.model.model_config import ModelConfig

if TYPE_CHECKING:
    from typing_extensions import Buffer

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class KvSpec:
    """What one token occupies in one layer; v_dim counts stored floats, 0 when V is a view of K."""

    num_layers: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    v_view_dim: int  # leading part of K that serves as V, 0 when V is stored

    @classmethod
    def of(cls, config: ModelConfig) -> KvSpec:
        """Return the layout that a model needs."""
        layers = config.num_hidden_layers
        if config.mla is not None:
            return cls(layers, 1, config.head_dim, 0, config.mla.kv_lora_rank)
        return cls(layers, config.num_key_value_heads, config.head_dim, config.head_dim, 0)

    @property
    def floats_per_token_layer(self) -> int:
        """Return the floats of one token in one layer."""
        return self.num_kv_heads * (self.k_dim + self.v_dim)

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of one token in all layers."""
        return self.num_layers * self.floats_per_token_layer * 4


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
        width = spec.floats_per_token_layer * block_tokens
        shape = (num_blocks, spec.num_layers, width)
        if buffer is None:
            self.array: Float = np.zeros(shape, dtype=np.float32)
        else:
            self.array = _wrap(buffer, shape)
        half = spec.num_kv_heads * block_tokens * spec.k_dim
        self._k = self._heads(self.array[:, :, :half], spec.k_dim)
        stored_v = self._heads(self.array[:, :, half:], spec.v_dim)
        self._v = self._k[..., : spec.v_view_dim] if spec.v_view_dim else stored_v

    def _heads(self, half: Float, dim: int) -> Float:
        """View [num_blocks, layers, width] as [layers, num_blocks, block_tokens, kv_heads, dim]."""
        kv_heads, tokens = self.spec.num_kv_heads, self.block_tokens
        view = half.reshape(self.num_blocks, self.spec.num_layers, kv_heads, tokens, dim)
        return view.transpose(1, 0, 3, 2, 4)

    def k(self, layer_idx: int) -> Float:
        """Return K of a layer, [num_blocks, block_tokens, kv_heads, k_dim], a view."""
        view: Float = self._k[layer_idx]
        return view

    def v(self, layer_idx: int) -> Float:
        """Return V of a layer, [num_blocks, block_tokens, kv_heads, v_dim], a view."""
        view: Float = self._v[layer_idx]
        return view


def _wrap(buffer: Buffer, shape: tuple[int, ...]) -> Float:
    flat: npt.NDArray[np.uint8] = np.frombuffer(memoryview(buffer).cast("B"), dtype=np.uint8)
    num_bytes = int(np.prod(shape)) * 4
    if flat.nbytes < num_bytes or not flat.flags.writeable or flat.ctypes.data % 4:
        raise ValueError(
            f"KV buffer of {flat.nbytes} bytes must be writable, aligned to 4 and hold {num_bytes} bytes"
        )
    blocks: Float = flat[:num_bytes].view(np.float32).reshape(shape)
    return blocks
