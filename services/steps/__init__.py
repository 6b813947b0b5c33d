"""Execution of step plans: rows, layers, sampling, and the loop that receives plans. For whoever computes steps."""
