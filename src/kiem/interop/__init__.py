"""Other formats: families of the ecosystem as name tables (families.py), and their weights (hf.py)."""
