"""Sweeps: the product of models, datasets, budgets, methods and seeds, one run folder a cell."""
