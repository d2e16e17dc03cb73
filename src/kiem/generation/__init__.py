"""Inference: from logits to tokens (sample.py), and from prompts to text (engine.py)."""
