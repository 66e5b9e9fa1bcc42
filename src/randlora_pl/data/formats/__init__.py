"""Readers of the catalog's image files: one module for each way in which a data set says what its images show.

`zoo` asks a torchvision class, `trees` takes folders for classes, `lists` reads annotation files, `voc` boxes.
"""
