"""DistFlow (section 6): moves the KV of finished prompts from prefill workers to decode workers, when those ask."""
