"""Optimizers, their parameter groups, and the schedule."""
