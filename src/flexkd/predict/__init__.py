"""Answers of a finished student to new rows, from its folder alone."""
