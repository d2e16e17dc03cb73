"""The chain rule with its numbers, and what an error means."""
