"""The inspector on Kiem's own models and runs: the only place where the two products meet."""
