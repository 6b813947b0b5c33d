"""Attention workers: the executors of DP groups. They hold KV blocks and everything of the model but the experts."""
