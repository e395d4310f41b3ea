"""What a command shows while it works and when it is done: progress, the log, its results and their tables."""
