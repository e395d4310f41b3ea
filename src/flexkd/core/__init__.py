"""The method: scores, selection, geometry, losses and the objective, on plain tensors."""
