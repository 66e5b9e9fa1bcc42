"""Downloads, safe unpacking, and installation of datasets."""
