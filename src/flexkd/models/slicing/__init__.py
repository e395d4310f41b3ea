"""Students cut from a teacher: shapes, importances, rotations and the weights that are kept."""
