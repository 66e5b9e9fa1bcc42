"""Plots and tables of a test: confusion matrix, per-class metrics, most confident mistakes."""
