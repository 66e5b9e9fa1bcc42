"""`data`: download, check and show datasets."""
