"""Catalog of datasets: one specification each, with class names and prompt templates.

Counts and epochs are from Table 7 of the paper. A validation split is the dataset's own if the paper uses it, else
10 % of the train split (at most 5,000), seeded and stratified. No specification imports PyTorch or NumPy.

The wording of prompts (one ``{}`` for the class name) was published with CLIP (Radford et al., 2021, prompts of the 27
datasets) and includes its odd spellings, because CLIP's zero-shot accuracies refer to it; the names of Caltech,
CIFAR-100, UCF101, Cars and CUB and the prompt of SVHN belong to the published accuracies that `zeroshot` shows. Long
lists are text files in ``names`` with one class per line by label: the folder name, and after a tab the class name if
it differs; ImageNet's file has folders only.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAMES = Path(__file__).parents[1] / "names"


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


def archive(url: str, checksum: str, into: str = "", **options: Any) -> Archive:
    """Return the archive at a URL."""
    return Archive(url.rpartition("/")[2], (url,), checksum, into, **options)


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
