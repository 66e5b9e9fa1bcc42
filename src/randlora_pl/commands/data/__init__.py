"""Download, verify and preview datasets."""
