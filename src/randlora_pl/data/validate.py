"""Instant checks of a user's data: options, class names, prompts, and the format of files. Imports no PyTorch."""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from randlora_pl.data.catalog import CAPTION_COLUMNS, CATALOG, CLASS_COLUMNS, SPLIT_OF, DatasetSpec, is_image, table_in
from randlora_pl.data.locations import as_typed, is_pattern, is_url
from randlora_pl.utils.errors import UserError, brief, log, near
from randlora_pl.utils.files import is_file

FORMATS = {
    "folder": "a sub-folder of images for each class",
    "table": "a CSV, TSV or Parquet file with a column of labels",
    "pairs": "a CSV, TSV or Parquet file with a column of captions",
    "hf": "a Hugging Face dataset",
    "webdataset": "tar shards",
}
"""Formats of a user's own images, by the name of their dataset."""

NEW = "new"
"""Value of ``--data.keep`` for the classes that ``--data.classes base`` leaves out."""


def check_epochs(max_epochs: int | None) -> None:
    """Refuse a number of epochs of the trainer."""
    if max_epochs != 1:
        raise UserError(
            f"trainer.max_epochs is {max_epochs}, but a run is a single Lightning epoch. "
            "Keep it at 1 and set --data.epochs or --data.steps"
        )


def is_draw(path: str | Path | None) -> bool:
    """Return True if a file of chosen images is a published draw, by its suffix."""
    return path is not None and Path(path).suffix.lower() == ".jsonl"


def check_trains(row: DatasetSpec, shots_file: str | None = None) -> None:
    """Refuse to train or to validate on a dataset that has test images only, and a published draw that is missing."""
    if row.trains_on:
        raise UserError(
            f"{row.title} has test images only. Train on {row.trains_on}, then run: "
            f"randlora-pl test --adapter RUN --data.dataset {row.name}"
        )
    if is_draw(shots_file) and not is_file(path := Path(str(shots_file)).expanduser()):
        raise UserError(f"The shots file {path} does not exist (--data.shots_file)")


def check_several(options: Mapping[str, object]) -> None:
    """Refuse options that need one class for each image, for data that may have several; others are unset."""
    for option in (name for name, chosen in options.items() if chosen):
        raise UserError(f"--data.{option} needs one class for each image, and these have several labels. Remove it")


def check_keep(keep: str, row: DatasetSpec, half: str) -> None:
    """Refuse to keep what has no class names or only test images, and what the training itself learns."""
    if row.captions:
        raise UserError("--data.keep compares classes, but captions have none. Remove it")
    others = [name for name, each in CATALOG.items() if not (each.own or each.captions or each.trains_on)]
    if half != "base" if keep == NEW else keep not in others or keep == row.name:
        raise UserError(
            f"--data.keep {keep} is not another dataset with classes and training images.{near(keep, others)} Choose "
            "one (randlora-pl datasets), or new with --data.classes base: the classes that the training leaves out"
        )


def check_softmax(mixup: float | None, cutmix: float | None, task: str, blended_labels: bool) -> None:
    """Refuse blended labels in a task that does not learn class probabilities."""
    if (mixup is not None or cutmix is not None) and not blended_labels:
        name = "mixup" if mixup is not None else "cutmix"
        raise UserError(
            f"--data.{name} needs a softmax over all classes, and {task} trains without one. Remove it, or use --model "
            "LinearHeadTask or TextHeadTask"
        )


def read_templates(templates: Sequence[str] | str | None) -> list[str] | None:
    """Return prompts from the option or from a text file, one per line; a text with {} is a single prompt.

    Raises:
        UserError: The file is missing, empty or not text, or a line has no {}.
    """
    if not isinstance(templates, str):
        return None if templates is None else list(templates)
    path = Path(templates).expanduser()
    if not is_file(path):
        if templates.startswith("["):
            raise UserError(
                f"--data.templates {brief(templates)} is not a list of texts, such as ['a photo of a {{}}.']"
            )
        if "{}" in templates:
            return [templates]
        raise UserError(
            f"The prompt file {path} does not exist (--data.templates); a prompt itself has {{}} for the class name"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompt file {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line and line.count("{}") != 1:
            raise UserError(f"{path}, line {number}: {line!r} must have {{}} once, where the class name goes")
    if not any(lines):
        raise UserError(f"The prompt file {path} is empty. Write one prompt per line, such as: a photo of a {{}}.")
    return [line for line in lines if line]


def check_templates(templates: Sequence[str] | None, captions: bool) -> None:
    """Check prompts; ``captions``: the dataset has no classes."""
    if templates is not None and captions:
        raise UserError("--data.templates needs classes; captions are used unchanged")
    if templates is not None and not templates:
        raise UserError("--data.templates is empty. Set at least one, such as ['a photo of a {}.']")
    for template in templates or ():
        if template.count("{}") != 1:
            raise UserError(f"The template {template!r} must have {{}} once, where the class name goes")


def class_names(row: DatasetSpec, in_files: Sequence[str], file: str | None = None) -> list[str]:
    """Return the class names by label, ``in_files`` in the dataset's files or read from a file; captions for captions.

    Raises:
        UserError: The file is invalid, or two classes have the same name.
    """
    own = row.classnames or in_files
    if row.captions:
        return list(own)
    if file is not None:
        names = _read_classnames(Path(file).expanduser(), own)
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


def _read_classnames(path: Path, classes: Sequence[str]) -> list[str]:
    """Read a name for each class: one per line in their order, or CSV ``folder,name``.

    ``classes`` are the dataset's own names (for a folder: the sub-folders), by label.
    """
    if not is_file(path):
        raise UserError(f"The class name file {path} does not exist (--data.classnames)")
    if path.suffix.lower() == ".json":  # its lines could be as many as the classes
        raise UserError(f"{path}: class names are not read from JSON. Write one per line, or CSV with folder,name")
    names: list[str] | dict[str, str]
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            lines = [line for line in csv.reader(text.splitlines()) if line]
            for line in lines:
                if len(line) != 2:
                    raise UserError(f"{path}: {','.join(line)!r} is not of the form folder,name")
            lines = lines[1:] if lines and lines[0] == ["folder", "name"] else lines
            names = {key.strip(): name.strip() for key, name in lines}
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The class name file {path} cannot be read: {error}") from error
    if isinstance(names, list):
        if len(names) != len(classes):
            raise UserError(f"{path} has {len(names)} class names, the dataset has {len(classes)} classes")
        return names
    for key in names:
        if key not in classes:
            raise UserError(f"{path} names the class {key!r}, which the dataset does not have.{near(key, classes)}")
    missing = [name for name in classes if name not in names]
    if missing:
        raise UserError(f"{path} has no name for {len(missing)} of {len(classes)} classes, the first: {missing[0]!r}")
    return [names[name] for name in classes]


def format_of(root: Path) -> str:
    """Return the name of the dataset (see `FORMATS`) that the files of a root are.

    Raises:
        UserError: The files have no known format, or several; the message has the choices.
    """
    formats = list(formats_of(root))
    if len(formats) == 1:
        return formats[0]
    if formats:
        what = " and ".join(f"{FORMATS[name]} ({name})" for name in formats)
        raise UserError(f"{root} has {what}.", f"Choose: --data.dataset {' or --data.dataset '.join(formats)}")
    if not root.exists():
        raise UserError(f"The data folder {root} does not exist. Set it with --data.root PATH")
    raise UserError(f"{root} is not data of a known format: {', '.join(FORMATS.values())}. See docs/your_own_data.md")


def formats_of(root: Path) -> Iterator[str]:
    """Yield the formats that the files of a root fit."""
    typed = as_typed(root)
    if is_url(typed) or (is_pattern(typed) and not root.exists()):
        yield "webdataset"
    elif root.is_file() and root.suffix.lower() in (".csv", ".tsv", ".parquet"):
        header = _columns(root)
        for name, column in (("table", CLASS_COLUMNS["label"]), ("pairs", CAPTION_COLUMNS["caption"])):
            if header.intersection(column):
                yield name
    elif root.is_file():
        lines = []
        with suppress(OSError, ValueError), root.open(encoding="utf-8-sig") as stream:
            lines = [line for line in stream.read(2**16).splitlines() if line.strip() and not line.startswith("#")]
        if re.search(r"\.(tar(\.\w+)?|tgz)$", root.name) or (lines and ".tar" in lines[0]):
            yield "webdataset"
    elif root.is_dir():
        below = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        files = [path for path in root.iterdir() if not path.is_dir()]
        for part in below:
            if part.name.lower() in ("data", *SPLIT_OF):  # not a class: listing a million images takes seconds
                files += [path for path in part.iterdir() if not path.is_dir()]
        suffixes = {path.suffix for path in files if not path.name.startswith(".")}
        saved = {path.name for path in files if path.parent == root}
        if "dataset_dict.json" in saved or {"state.json", "dataset_info.json"} <= saved or ".parquet" in suffixes:
            yield "hf"
        if ".tar" in suffixes:
            yield "webdataset"
        listed = (file := table_in(root)) is not None and not _columns(file).isdisjoint(CLASS_COLUMNS["label"])
        if listed:
            yield "table"
        if sum(_holds_image(path, 4) for path in below[: 2 if listed else None]) > listed:  # one has images, no class
            yield "folder"


def _holds_image(home: Path, depth: int) -> bool:
    """Return True if there is an image at most so many folders below one, such as SPLIT/CLASS/IMAGE."""
    if any(map(is_image, home.iterdir())):  # not glob, which skips folders that cannot be read
        return True
    return depth > 0 and any(_holds_image(path, depth - 1) for path in home.iterdir() if path.is_dir())


def _columns(file: Path) -> set[str]:
    """Return the names of a table's columns in lower case; none if it cannot be read."""
    try:
        if file.suffix.lower() == ".parquet":
            from pyarrow import parquet

            return {name.strip().lower() for name in parquet.read_schema(file).names}
        with file.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline(2**20)
        header = next(csv.reader([first], delimiter=max(",;\t", key=first.count)), [])
        return {name.strip().lower() for name in header}
    except (ImportError, OSError, ValueError, csv.Error):  # pyarrow's errors are ValueErrors
        return set()
