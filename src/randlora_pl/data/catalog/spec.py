"""Static descriptions of datasets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from randlora_pl.data.catalog import templates as prompts


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


def archive(url: str, checksum: str = "", into: str = "", mirrors: tuple[str, ...] = (), **options: Any) -> Archive:
    """Return the archive at a URL, with optional mirrors."""
    return Archive(url.rpartition("/")[2], (url, *mirrors), checksum, into, **options)


@dataclass(frozen=True)
class DatasetSpec:
    """Specification of a dataset.

    Attributes:
        name: Name in options.
        title: Full name.
        reader: Function of `randlora_pl.data.readers.dispatch`, or ``module:function``, that reads one split.
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
    templates: tuple[str, ...] = prompts.PHOTO
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
