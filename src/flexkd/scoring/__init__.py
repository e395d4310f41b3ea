"""How much a task uses each unit or direction of a teacher."""
