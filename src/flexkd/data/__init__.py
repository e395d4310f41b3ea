"""Rows from files, packages and the hub: read, checked, split and encoded into batches."""
