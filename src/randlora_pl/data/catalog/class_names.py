"""Class names for prompts: from the catalog, from the dataset's files, or from a file of the user."""

import csv
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.files.plain_files import is_file

log = logging.getLogger("randlora_pl")


def class_names(row: DatasetSpec, found: Sequence[str], file: str | None = None) -> list[str]:
    """Return the class names by label; captions for caption datasets.

    Args:
        row: Specification of the dataset.
        found: Class names in its files.
        file: File of names (see `read_classnames`).

    Raises:
        UserError: The file is invalid, or two classes have the same name.
    """
    own = row.classnames or found
    if row.captions:
        return list(own)
    if file is not None:
        names = read_classnames(Path(file).expanduser(), own)
    else:
        names = [name.replace("_", " ") for name in own] if row.own else list(own)
        if row.patterns and all(re.fullmatch(r"class \d+", name) for name in own):
            log.warning(
                "the shards have class numbers only: prompts such as 'a photo of a class 0.' mean nothing to "
                "CLIP. Put classnames.txt (one name per line) next to them, or set --data.classnames FILE"
            )
    name, times = Counter(names).most_common(1)[0]
    if times > 1 and (row.own or file is not None):  # ImageNet has two missiles, for example
        raise UserError(f"Two classes are both called {name!r}. Set different names with --data.classnames FILE")
    return names


def read_classnames(path: Path, classes: Sequence[str]) -> list[str]:
    """Read class names: one per line in the order of the classes, CSV ``folder,name``, or a JSON mapping.

    Args:
        path: File; its suffix selects the format.
        classes: Dataset's own names (for a folder: the sub-folders), by label.

    Returns:
        One name per class.

    Raises:
        UserError: The file is missing, names too few or too many classes, or an unknown one.
    """
    if not is_file(path):
        raise UserError(f"The class name file {path} does not exist (--data.classnames)")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            loaded = parse_json(text)
            if isinstance(loaded, list):
                return _one_each(path, [str(name) for name in loaded], classes)
            return _mapped(path, {str(key): str(name) for key, name in loaded.items()}, classes)
        if path.suffix.lower() == ".csv":
            lines = [line for line in csv.reader(text.splitlines()) if line]
            for line in lines:
                if len(line) != 2:
                    raise UserError(f"{path}: {','.join(line)!r} is not of the form folder,name")
            lines = lines[1:] if lines and lines[0] == ["folder", "name"] else lines
            return _mapped(path, {key.strip(): name.strip() for key, name in lines}, classes)
        return _one_each(path, [line.strip() for line in text.splitlines() if line.strip()], classes)
    except (OSError, ValueError, AttributeError, csv.Error) as error:
        raise UserError(f"The class name file {path} cannot be read: {error}") from error


def _one_each(path: Path, names: list[str], classes: Sequence[str]) -> list[str]:
    if len(names) != len(classes):
        raise UserError(f"{path} has {len(names)} class names, the dataset has {len(classes)} classes")
    return names


def _mapped(path: Path, names: dict[str, str], classes: Sequence[str]) -> list[str]:
    for key in names:
        if key not in classes:
            raise UserError(f"{path} names the class {key!r}, which the dataset does not have.{near(key, classes)}")
    missing = [name for name in classes if name not in names]
    if missing:
        raise UserError(f"{path} has no name for {len(missing)} of {len(classes)} classes, the first: {missing[0]!r}")
    return [names[name] for name in classes]
