"""Analyses over adapter files: what updates are made of, what they do to activations, losses and other data sets."""
