"""Plan a step on a device: what it takes, what fits a memory budget, and what to compute again."""
