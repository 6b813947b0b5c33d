"""XCCL: collective communication over shared memory (paper section 3)."""
