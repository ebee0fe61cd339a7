"""Training of the binary tokenizer on pictures from image shards."""
