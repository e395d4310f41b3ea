"""Rows from files, packages and the hub, on their way to batches."""
