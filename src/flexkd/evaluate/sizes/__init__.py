"""What several sizes of one recipe say together: their curve, its knee, and what to try next."""
