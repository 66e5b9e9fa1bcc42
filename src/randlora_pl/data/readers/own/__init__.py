"""Readers of the user's own images: folders, tables, Hugging Face datasets, tar shards, captions."""
