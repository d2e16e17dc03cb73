"""Training: one step, one loop, and what keeps a run alive."""
