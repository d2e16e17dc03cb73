"""Verdicts on gradients: each operation, then each parameter end to end."""
