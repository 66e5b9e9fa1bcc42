"""Plots and tables of a test: confusion matrix, per-class metrics, surest mistakes."""
