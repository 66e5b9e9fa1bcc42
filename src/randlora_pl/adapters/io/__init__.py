"""Adapter files: format, schema, checks against a model, saving and loading."""
