"""Tiny but true copies of all on-disk formats, from their public descriptions and without any of the readers.

Each copy has all classes and a few images of each: same folders, same annotation files, and files of the kinds that
the real sets hold. The colour of an image says its label, so that a test can tell whether pixels and labels agree.
"""

from collections.abc import Callable
from pathlib import Path

from tests.data.readers import annotated, arrays, trees
from tests.data.readers.pictures import Made

BUILDERS: dict[str, Callable[[Path], Made]] = {
    "cars": annotated.cars,
    "dtd": annotated.dtd,
    "eurosat": trees.eurosat,
    "gtsrb": trees.gtsrb,
    "mnist": arrays.mnist,
    "resisc45": annotated.resisc45,
    "sun397": annotated.sun397,
    "svhn": arrays.svhn,
    "cifar10": arrays.cifar10,
    "cifar100": arrays.cifar100,
    "imagenet": trees.imagenet,
    "stl10": arrays.stl10,
    "food101": annotated.food101,
    "caltech101": trees.caltech101,
    "caltech256": trees.caltech256,
    "fgvcaircraft": annotated.fgvcaircraft,
    "flowers102": annotated.flowers102,
    "oxfordpets": annotated.oxfordpets,
    "cub200": annotated.cub200,
    "pascalvoc": annotated.pascalvoc,
    "country211": trees.country211,
    "ucf101": annotated.ucf101,
    "emoji_tones": annotated.emoji,
}
