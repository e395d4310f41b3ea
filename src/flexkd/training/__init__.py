"""A training loop whose loss is an objective; it knows no recipe."""
