"""Batches and worker processes."""
