"""Slow float64 derivations from the method's text (never from the package), the second opinion of the tests."""
