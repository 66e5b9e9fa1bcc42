"""Sweeps: the product of models, data sets, budgets, methods and seeds, one run folder a cell."""
