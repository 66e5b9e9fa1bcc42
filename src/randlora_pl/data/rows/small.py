"""Small images that fit memory: digits, clothes, CIFAR, SVHN, STL-10."""

from dataclasses import replace

from randlora_pl.data import prompts
from randlora_pl.data.row import Row, counts

FASHION_UNSEEN = (5, 6, 7, 8, 9)
"""FashionMNIST labels that the tiny CLIP's pretraining never saw: Sandal, Shirt, Sneaker, Bag, Ankle boot."""

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
    counts=counts(55_000, 5_000, 10_000),
    options={"name": "FashionMNIST"},
    layout=_IDX.format("FashionMNIST"),
    download=True,
    note="not in the paper: epochs as MNIST, which has the same size",
)
_CIFAR10 = Row(
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
    download=True,
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
        counts=counts(1294, 143, 360),
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
        counts=counts(55_000, 5_000, 10_000),
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
        counts=counts(27_000, 3_000, 5_000),
        options={"name": "FashionMNIST", "keep": FASHION_UNSEEN},
        note="evidence that the tiny CLIP learns classes new to it",
    ),
    Row(
        name="svhn",
        title="Street View House Numbers, cropped digits",
        reader="torchvision_set",
        epochs=4,
        licence="non-commercial use only",
        source="http://ufldl.stanford.edu/housenumbers",
        classnames=prompts.DIGIT_SIGNS,
        templates=prompts.NUMBER,
        counts=counts(68_257, 5_000, 26_032),
        options={"name": "SVHN", "folder": "svhn"},
        layout="svhn/{train_32x32.mat,test_32x32.mat}",
        download=True,
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
        note="class names keep their underscores, as in the published zero-shot figures",
    ),
    Row(
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
        download=True,
    ),
)
