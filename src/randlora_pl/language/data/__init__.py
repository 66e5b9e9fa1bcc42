"""DataModules and batches of texts."""
