"""Rows from wherever they are stored."""
