"""Records as things that people read: charts, a page and a model card."""
