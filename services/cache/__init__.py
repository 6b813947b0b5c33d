"""KV cache bookkeeping: which block belongs to whom. The bytes themselves live in the attention worker."""
