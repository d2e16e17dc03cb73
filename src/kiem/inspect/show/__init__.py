"""What a person sees of a recorded program: terminal, page, JSON."""
