"""Splits, few-shot subsets, and the sample order of a run."""
