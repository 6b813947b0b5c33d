"""KV cache bookkeeping: who refers to which block, and what is in it. The bytes live in the attention worker."""
