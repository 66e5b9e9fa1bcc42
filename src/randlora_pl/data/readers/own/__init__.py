"""Readers of a user's own images: folders, tables, Hugging Face datasets, tar shards, captions."""
