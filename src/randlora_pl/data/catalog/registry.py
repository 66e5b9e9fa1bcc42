"""Registry of the datasets, the rows of a user's own, and CoOp's versions: split files of nine, and the prompts of all.

Zhou et al., Learning to Prompt for Vision-Language Models (arXiv 2109.01134). ImageNet and Aircraft have no split file:
their images stay as they are, and so do ImageNet's shifted test sets. Neither PyTorch nor NumPy is imported, so that
listing is instant.
"""

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from randlora_pl.data.catalog import photographs, small
from randlora_pl.data.catalog.small import FASHION_UNSEEN as FASHION_UNSEEN
from randlora_pl.data.catalog.spec import FLOWER, FOOD, PET, PHOTO, counts
from randlora_pl.data.catalog.spec import DatasetSpec as DatasetSpec
from randlora_pl.data.locations import as_typed, is_command, is_pattern, is_url
from randlora_pl.utils.errors import UserError, near

PAPER = (
    "cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn", "cifar10", "cifar100", "imagenet",
    "stl10", "food101", "caltech101", "caltech256", "fgvcaircraft", "flowers102", "oxfordpets", "cub200", "pascalvoc",
    "country211", "ucf101",
)  # fmt: skip
"""The 22 datasets of the paper, in the order of its Table 7."""


def _own(name: str, title: str, reader: str, root: str, **more: Any) -> DatasetSpec:
    reader = f"randlora_pl.data.readers.{reader}"
    return DatasetSpec(name, title, reader, 10, "yours", f"--data.root {root}", own=True, **more)


OWN = (
    _own(
        "folder",
        "Your own folder of images, a sub-folder for each class",
        "trees:folder",
        "FOLDER",
        layout="CLASS/IMAGE, or train/CLASS/IMAGE with val/ and test/ beside it",
        note="without test/ and val/: 20 % and 10 % are set aside, stratified",
    ),
    _own(
        "table",
        "Your own table of images and classes: CSV, TSV or Parquet",
        "table:table",
        "FILE.csv",
        layout="a CSV, TSV or Parquet file with the columns path,label[,split]; paths are relative to it",
        note="without splits 20 % and 10 % are set aside for test and val, stratified",
    ),
    _own(
        "hf",
        "Your own Hugging Face dataset in a folder",
        "huggingface:hub",
        "FOLDER",
        layout="a folder of Dataset.save_to_disk, or of Parquet files such as train-00000-of-00001.parquet",
        note='needs the package datasets: pip install ".[hf]" in the checkout',
    ),
    _own(
        "pairs",
        "Your own images with captions, for retrieval",
        "table:pairs",
        "FILE.csv",
        templates=("{}",),
        layout="a CSV, TSV or Parquet file with the columns image,caption[,split]; paths are relative to it",
        flip=False,  # captions may say left and right
        captions=True,
        note="several captions for one image: several lines",
    ),
    _own(
        "webdataset",
        "Your own tar shards (WebDataset)",
        "tar_shards:shards",
        "SHARDS",
        layout="a folder of .tar files, a pattern such as train-{000..099}.tar, or a text file that lists them",
        patterns=True,
        note="a sample is an image and its .cls or .json; classnames.txt and templates.txt are optional",
    ),
)

ROWS = (*small.ROWS, *small.EMOJI, *photographs.ROWS, *OWN)

CATALOG: dict[str, DatasetSpec] = {row.name: row for row in ROWS}


def find(name: str) -> DatasetSpec:
    """Return the specification of a dataset.

    Raises:
        UserError: The dataset is unknown; similar names are suggested.
    """
    if name not in CATALOG:
        raise UserError(
            f"Unknown dataset {name!r}.{near(name, CATALOG)} "
            f"Known: {', '.join(CATALOG)}. Your own images: --data.dataset folder --data.root PATH"
        )
    return CATALOG[name]


def default_root() -> Path:
    """Return the folder of downloaded datasets: ``RANDLORA_DATA`` if set, else the user's data folder."""
    import platformdirs

    return Path(os.environ.get("RANDLORA_DATA") or platformdirs.user_data_path("randlora-pl") / "datasets")


def dataset_path(row: DatasetSpec, root: Path) -> Path | None:
    """Return the file or folder of a dataset, or None if it is not on disk."""
    if row.own:
        return root
    first = row.layout.partition("/")[0]
    return root / first if first else None


def present(row: DatasetSpec, root: Path) -> bool:
    """Return True if the file or folder of the dataset exists, with what it needs (not verified)."""
    if row.package:
        return find_spec(row.package) is not None
    held = dataset_path(row, root)
    there = held is None or (held.exists() and all((root / path).exists() for path in row.needs))
    return there or may_be_read(row, root)


def may_be_read(row: DatasetSpec, root: Path) -> bool:
    """Return True if a root is a pattern of shards or a URL, for datasets that allow them."""
    location = as_typed(root)
    return row.patterns and (
        is_url(location) or is_pattern(location) or is_command(location)
    )  # the reader refuses commands


def how_to_get(row: DatasetSpec, root: Path) -> str:
    """Return an error line for a missing dataset: the expected files and the command to get them."""
    if row.own:
        return f"{row.name}: {root} does not exist, expected {row.layout}"
    if row.package:
        return f"{row.name} comes with the package {row.package}: {get_command(row, root)}"
    return f"{row.name} is not in {root}: expected {row.layout}; get it: {get_command(row, root)}"


def get_command(row: DatasetSpec, root: Path) -> str:
    """Return the command that gets a dataset or prints how to get it."""
    if row.package:
        return f"pip install {row.package}"
    return f"randlora-pl data get {row.name}" + ("" if root == default_root() else f" --root {shlex.quote(str(root))}")


class SplitFile(NamedTuple):
    """Split file of a dataset.

    Attributes:
        file: Path of the JSON file below the root.
        images: Folder below the root that its paths start from.
        classes: Number of classes.
        counts: Expected images by split.
    """

    file: str
    images: str
    classes: int
    counts: Mapping[str, int]


SPLIT_FILES = {
    "caltech101": SplitFile(
        "caltech101/split_zhou_Caltech101.json", "caltech101/101_ObjectCategories", 100, counts(4_128, 1_649, 2_465)
    ),
    "oxfordpets": SplitFile(
        "oxford-iiit-pet/split_zhou_OxfordPets.json", "oxford-iiit-pet/images", 37, counts(2_944, 736, 3_669)
    ),
    "cars": SplitFile("stanford_cars/split_zhou_StanfordCars.json", "stanford_cars", 196, counts(6_509, 1_635, 8_041)),
    "flowers102": SplitFile(
        "flowers-102/split_zhou_OxfordFlowers.json", "flowers-102/jpg", 102, counts(4_093, 1_633, 2_463)
    ),
    "food101": SplitFile("food-101/split_zhou_Food101.json", "food-101/images", 101, counts(50_500, 20_200, 30_300)),
    "sun397": SplitFile("SUN397/split_zhou_SUN397.json", "SUN397", 397, counts(15_880, 3_970, 19_850)),
    "dtd": SplitFile("dtd/split_zhou_DescribableTextures.json", "dtd/dtd/images", 47, counts(2_820, 1_128, 1_692)),
    "eurosat": SplitFile("eurosat/split_zhou_EuroSAT.json", "eurosat/2750", 10, counts(13_500, 5_400, 8_100)),
    "ucf101": SplitFile("ucf101/split_zhou_UCF101.json", "ucf101/UCF-101-midframes", 101, counts(7_639, 1_898, 3_783)),
}

_PROMPTS = {
    "oxfordpets": PET,
    "flowers102": FLOWER,
    "fgvcaircraft": ("a photo of a {}, a type of aircraft.",),
    "food101": FOOD,
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "ucf101": ("a photo of a person doing {}.",),
}

_AS_THEY_ARE = ("imagenet", "fgvcaircraft")


def has_coop(row: DatasetSpec) -> bool:
    """Return True if there is a version of CoOp of a dataset, or if it tests the classes of one."""
    return row.name in SPLIT_FILES or row.name in _AS_THEY_ARE or row.trains_on in _AS_THEY_ARE


def with_split(row: DatasetSpec, split: str) -> DatasetSpec:
    """Return a dataset with another split: its files, class names, counts and prompts.

    Args:
        row: Specification of the dataset.
        split: ``default`` for the same, or ``coop``.

    Raises:
        UserError: The dataset does not have this split.
    """
    if split == "default":
        return row
    if not has_coop(row):
        known = ", ".join([*SPLIT_FILES, *_AS_THEY_ARE])
        what = f"--data.split coop: {row.name} does not have this split. Remove the option"
        raise UserError(f"{what}. Datasets that have it: {known}")
    row = replace(row, templates=_PROMPTS.get(row.name, PHOTO))
    if row.name not in SPLIT_FILES:
        return row
    found = SPLIT_FILES[row.name]
    top, _, below = found.images.partition("/")
    beside = found.file.partition("/")[2]
    return replace(
        row,
        reader="randlora_pl.data.readers.lists:split_file",
        classnames=(),
        class_count=found.classes,
        counts=found.counts,
        options={"file": found.file, "images": found.images},
        layout=f"{top}/{{{beside},{below + '/' if below else ''}...}}",
        files=(),
        by_hand=(),
        note="CoOp's split, class names and prompt",
    )
