"""Adapters written by other programs."""
