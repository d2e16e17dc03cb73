"""A standalone program that shows one wrong gradient."""
