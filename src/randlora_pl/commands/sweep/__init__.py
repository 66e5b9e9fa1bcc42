"""`sweep` and `tune`."""
