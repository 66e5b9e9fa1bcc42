"""Bringing data sets to this machine: downloads, safe unpacking, and putting the files in place."""
