"""Models as they run: their hidden states, heads, positions, modes and number types."""
