"""What INT8 costs: `python -m tests.parity.int8_perplexity [CHECKPOINT]`, the demo model by default.

Prints, for each form of KV cache and wire, the perplexity on held-out text, its change, and the bytes of a token in the
cache and of its row on the wire.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bus.config import PodConfig, model_path
from bus.xccl.relay_layout import RelayShape
from services.model import KvSpec, load_config
from services.quantize.perplexity import evaluate
from services.quantize.text import default_texts, windows

WINDOWS, WINDOW_TOKENS, SEED = 16, 512, 0  # as `xds quantize`


def main(folder: Path) -> None:
    """Print the table."""
    config = load_config(folder)
    _, held_out = default_texts()
    chosen = windows(folder, held_out, WINDOWS, WINDOW_TOKENS, SEED)
    print(f"{folder.name}: {chosen.size} tokens in windows of {WINDOW_TOKENS}")
    base = None
    for dtype, wire in (("auto", False), ("int8", False), ("auto", True), ("int8", True)):
        if dtype == "int8" and config.mla is None:
            continue
        found = evaluate(folder, chosen, kv_cache_dtype=dtype, wire_int8=wire).perplexity
        base = base or found
        shape = RelayShape(
            num_attention_ranks=1,
            num_expert_ranks=1,
            rows_max=1,
            num_slots=1,
            hidden=config.hidden_size,
            int8=wire,
        )
        row_bytes = shape.row_bytes + (4 if wire else 0)
        print(
            f"kv {dtype:4} wire {'int8' if wire else 'float32':7} perplexity {found:.4f} ({found / base - 1:+.3%})  "
            f"{KvSpec.of(config, dtype).bytes_per_token} B per cached token  {row_bytes} B per row on the wire"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else model_path(PodConfig()))
