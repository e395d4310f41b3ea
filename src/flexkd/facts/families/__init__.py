"""Architectures as data: where the hidden state lies, and what each axis of each weight means."""
