"""Rows to examples: texts, turns, labels and splits."""
