"""XCCL: collective communication over shared memory (paper sections 2 to 4)."""
