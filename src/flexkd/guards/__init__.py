"""What keeps a run safe from others that work in the same place, and from the disk."""
