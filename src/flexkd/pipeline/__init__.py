"""Recipes to results: the whole job, comparisons, caches and records."""
