"""Expert workers: no requests, no KV; driven by what arrives."""
