"""Facts as plain data that several packages read: what is true of each loss, metric, architecture and file."""
