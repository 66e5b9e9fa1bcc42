"""The rows of the catalog, by family; a row is data, and none of these modules imports PyTorch or NumPy.

Counts and epochs are those of Table 7 of the paper; a validation split is the data set's own where it has one that
the paper uses, else 10 % of the train split (at most 5,000), seeded and stratified.
"""
