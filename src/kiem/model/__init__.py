"""The transformer: one class for every family; the config decides."""
