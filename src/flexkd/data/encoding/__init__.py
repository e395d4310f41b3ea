"""Examples to token ids and batches."""
