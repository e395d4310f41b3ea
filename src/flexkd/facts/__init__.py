"""Plain data that several rooms read: what is true of each loss, metric, architecture and file."""
