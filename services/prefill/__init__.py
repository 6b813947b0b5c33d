"""Prefill workers: executors that compute prompts, all experts in the process, and offer their KV."""
