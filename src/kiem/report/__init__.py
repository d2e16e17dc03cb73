"""What a person sees of a run: report.json, report.html, the same in the terminal, TensorBoard files."""
