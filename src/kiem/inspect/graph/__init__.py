"""The recorded program as data."""
