"""Datasets of texts: GLUE, commonsense, E2E, and a user's own files."""
