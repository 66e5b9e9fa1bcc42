"""Analyses of adapter files: spectra of updates, and effects on activations, losses and other datasets."""
