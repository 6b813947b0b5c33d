"""Continuous batching of one executor, pure: requests, queues, blocks, plans. For whoever schedules steps."""
