"""Where experts live. Pure planning; live rebalancing builds on the same map."""
