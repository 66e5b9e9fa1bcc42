"""The data sets, one row each. Imports neither PyTorch nor NumPy, so that listing them is instant."""

import os
import shlex
from importlib.util import find_spec
from pathlib import Path

from randlora_pl.data.catalog import fine, objects, own, scenes, small
from randlora_pl.data.catalog.small import FASHION_UNSEEN as FASHION_UNSEEN
from randlora_pl.data.catalog.spec import Row as Row
from randlora_pl.data.locations import is_command, is_pattern, is_url, spelled
from randlora_pl.utils.errors import UserError, near

PAPER = (
    "cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn", "cifar10", "cifar100", "imagenet",
    "stl10", "food101", "caltech101", "caltech256", "fgvcaircraft", "flowers102", "oxfordpets", "cub200", "pascalvoc",
    "country211", "ucf101",
)  # fmt: skip
"""The 22 data sets of the paper, in the order of its Table 7."""

ROWS = (*small.ROWS, *fine.ROWS, *objects.ROWS, *scenes.ROWS, *own.ROWS)

CATALOG: dict[str, Row] = {row.name: row for row in ROWS}


def find(name: str) -> Row:
    """The row called ``name``.

    Raises:
        UserError: No such data set; near names are suggested.
    """
    if name not in CATALOG:
        raise UserError(
            f"There is no data set {name!r}.{near(name, CATALOG)} "
            f"Known: {', '.join(CATALOG)}. Your own images: --data.dataset folder --data.root PATH"
        )
    return CATALOG[name]


def default_root() -> Path:
    """Folder of the downloaded data sets: ``RANDLORA_DATA`` if set, else the user's data folder."""
    import platformdirs

    return Path(os.environ.get("RANDLORA_DATA") or platformdirs.user_data_path("randlora-pl") / "datasets")


def place(row: Row, root: Path) -> Path | None:
    """The file or folder that holds a data set; None where nothing is read from disk."""
    if row.own:
        return root
    first = row.layout.partition("/")[0]
    return root / first if first else None


def present(row: Row, root: Path) -> bool:
    """Whether there is anything of a data set; it may still be damaged."""
    if row.package:
        return find_spec(row.package) is not None
    held = place(row, root)
    return held is None or held.exists() or may_be_read(row, root)


def may_be_read(row: Row, root: Path) -> bool:
    """Whether a root that is no path says where a data set is: a pattern of shards, or their URL."""
    place = spelled(root)
    return row.patterns and (is_url(place) or is_pattern(place) or is_command(place))  # the reader refuses commands


def how_to_get(row: Row, root: Path) -> str:
    """One line for a data set that is not there: where it was expected, and how to get it."""
    if row.own:
        return f"{row.name}: {root} does not exist, expected {row.layout}"
    if row.package:
        return f"{row.name} comes with the package {row.package}: {get_command(row, root)}"
    return f"{row.name} is not in {root}: expected {row.layout}; get it: {get_command(row, root)}"


def get_command(row: Row, root: Path) -> str:
    """What the user types to get a data set, or to be told how."""
    if row.package:
        return f"pip install {row.package}"
    return f"randlora-pl data get {row.name}" + ("" if root == default_root() else f" --root {shlex.quote(str(root))}")
