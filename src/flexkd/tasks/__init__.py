"""Kinds of task: what a run does differently for classification and for text."""
