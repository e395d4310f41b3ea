"""The answers of a teacher on disk: written once, read by row, verified."""
