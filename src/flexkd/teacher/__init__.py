"""The teacher's side of a loss: computed on each batch, or read from a cache on disk."""
