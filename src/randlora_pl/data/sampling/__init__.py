"""Splits, few-shot subsets, and the numbered draws of a run."""
