"""Scoring, training and the whole job."""
