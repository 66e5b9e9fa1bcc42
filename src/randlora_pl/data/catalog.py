"""The data sets, one row each. Imports neither PyTorch nor NumPy, so that listing them is instant."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from randlora_pl.data import prompts
from randlora_pl.errors import UserError, near

FASHION_UNSEEN = (5, 6, 7, 8, 9)
"""FashionMNIST labels that the tiny CLIP's pretraining never saw: Sandal, Shirt, Sneaker, Bag, Ankle boot."""


@dataclass(frozen=True)
class Row:
    """One data set.

    Attributes:
        name: What the user types.
        title: The data set's own name.
        reader: Function of `randlora_pl.data.readers`, or ``module:function``, that reads one split.
        epochs: Epochs of a run on the full train split (Table 7 of the paper where it lists the data set).
        licence: Terms of use, in a few words.
        source: Where the images come from.
        classnames: Class names by label; empty where the user's own files say them.
        templates: Prompt templates with one ``{}`` each.
        counts: Expected images by split (``train``, ``val``, ``test``), validation already taken out of train.
        options: Further arguments of the reader.
        layout: Files expected below the root; empty where nothing is read from disk.
        download: Whether ``--data.download true`` can fetch it.
        flip: Whether training flips images horizontally unless the user says otherwise.
        own: The user's own images: short runs are always extended, not only few-shot ones.
        captions: The labels are captions rather than classes: recall is what counts.
        note: A remark worth a line in a listing.
    """

    name: str
    title: str
    reader: str
    epochs: int
    licence: str
    source: str
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = prompts.PHOTO
    counts: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    layout: str = ""
    download: bool = False
    flip: bool = True
    own: bool = False
    captions: bool = False
    note: str = ""

    @property
    def classes(self) -> int | None:
        """Number of classes, or None where the user's own files decide it."""
        return len(self.classnames) or None


_IDX = "{}/raw/{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte (unpacked)"
_FASHION = Row(
    name="fashion_mnist",
    title="Fashion-MNIST",
    reader="torchvision_set",
    epochs=5,
    licence="MIT",
    source="https://github.com/zalandoresearch/fashion-mnist",
    classnames=prompts.FASHION,
    templates=prompts.CLOTHING,
    counts={"train": 55_000, "val": 5_000, "test": 10_000},
    options={"name": "FashionMNIST"},
    layout=_IDX.format("FashionMNIST"),
    download=True,
    note="not in the paper: epochs as MNIST, which has the same size",
)

ROWS = (
    Row(
        name="digits",
        title="Handwritten digits of scikit-learn",
        reader="digits",
        epochs=10,  # not in the paper: as its few-shot runs
        licence="CC BY 4.0",
        source="https://archive.ics.uci.edu/dataset/80 (test part, shipped with scikit-learn)",
        classnames=prompts.DIGIT_WORDS,
        templates=prompts.DIGIT,
        counts={"train": 1294, "val": 143, "test": 360},
        flip=False,
        note="embedded, 8 x 8 pixels, fixed stratified split",
    ),
    Row(
        name="mnist",
        title="MNIST",
        reader="torchvision_set",
        epochs=5,
        licence="CC BY-SA 3.0",
        source="https://yann.lecun.com/exdb/mnist",
        classnames=prompts.DIGIT_SIGNS,
        templates=prompts.NUMBER,
        counts={"train": 55_000, "val": 5_000, "test": 10_000},
        options={"name": "MNIST"},
        layout=_IDX.format("MNIST"),
        download=True,
        flip=False,
        note="the official code flips digits too: --data.flip true",
    ),
    _FASHION,
    replace(
        _FASHION,
        name="fashion_mnist_unseen",
        title="Fashion-MNIST, the five classes outside the tiny CLIP's pretraining",
        classnames=tuple(prompts.FASHION[label] for label in FASHION_UNSEEN),
        counts={"train": 27_000, "val": 3_000, "test": 5_000},
        options={"name": "FashionMNIST", "keep": FASHION_UNSEEN},
        note="evidence that the tiny CLIP learns classes new to it",
    ),
    Row(
        name="cifar10",
        title="CIFAR-10",
        reader="torchvision_set",
        epochs=5,
        licence="not stated by its authors",
        source="https://www.cs.toronto.edu/~kriz/cifar.html",
        classnames=prompts.CIFAR10,
        templates=prompts.CIFAR,
        counts={"train": 45_000, "val": 5_000, "test": 10_000},
        options={"name": "CIFAR10"},
        layout="cifar-10-batches-py/{data_batch_1 ... data_batch_5, test_batch, batches.meta}",
        download=True,
    ),
    Row(
        name="folder",
        title="Your own folder of images, a sub-folder for each class",
        reader="randlora_pl.data.folders:folder",
        epochs=10,
        licence="yours",
        source="--data.root FOLDER",
        layout="CLASS/IMAGE, or train/CLASS/IMAGE with val/ and test/ beside it",
        own=True,
        note="without test/ and val/: 20 % and 10 % are set aside, stratified",
    ),
    Row(
        name="pairs",
        title="Your own images with captions, for retrieval",
        reader="randlora_pl.data.pairs:pairs",
        epochs=10,
        licence="yours",
        source="--data.root FILE.csv",
        templates=prompts.CAPTION,
        layout="a CSV file with the columns image,caption[,split]; image paths are relative to it",
        flip=False,  # captions may say left and right
        own=True,
        captions=True,
        note="several captions for one image: several lines",
    ),
)

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
