"""How good a model is and what it costs, measured the same way for every model of a run."""
