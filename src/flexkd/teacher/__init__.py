"""Where the teacher's side of a loss comes from."""
