"""Catalog of datasets: one specification each, with class names and prompt templates.

Counts and epochs are from Table 7 of the paper. A validation split is the dataset's own if the paper uses it, else
10 % of the train split (at most 5,000), seeded and stratified. No specification imports PyTorch or NumPy.
"""
