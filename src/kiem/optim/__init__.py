"""Optimisers, their parameter groups, and the schedule."""
