"""Text becomes batches: sources, tokenizer, shards, order, loader. Only loader.py imports torch."""
