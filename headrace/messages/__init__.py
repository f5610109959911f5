"""Messages between processes, one file a boundary."""
