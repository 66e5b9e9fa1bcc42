"""What is known of a data set without touching it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from randlora_pl.data.catalog import templates as prompts


@dataclass(frozen=True)
class Archive:
    """One file of a data set's source, and where what it holds goes.

    Attributes:
        name: Its file name.
        urls: Where it can be fetched, tried in this order; empty where a person must fetch it.
        checksum: ``md5:HEX`` or ``sha256:HEX``; empty where nobody gives one.
        into: Folder below the root that it is unpacked into; a file that is no archive is put there.
        inner: The archive inside it that holds the images.
        leave: Patterns of what is not unpacked, because nothing here reads it.
        page: Where a person finds it, instead of the URLs or where these answer no longer.
    """

    name: str
    urls: tuple[str, ...] = ()
    checksum: str = ""
    into: str = ""
    inner: str = ""
    leave: tuple[str, ...] = ()
    page: str = ""


def archive(url: str, checksum: str = "", into: str = "", mirrors: tuple[str, ...] = (), **options: Any) -> Archive:
    """The archive at a URL, with further URLs of the same file."""
    return Archive(url.rpartition("/")[2], (url, *mirrors), checksum, into, **options)


@dataclass(frozen=True)
class Row:
    """One data set.

    Attributes:
        name: What the user types.
        title: The data set's own name.
        reader: Function of `randlora_pl.data.readers.dispatch`, or ``module:function``, that reads one split.
        epochs: Epochs of a run on the full train split (Table 7 of the paper where it lists the data set).
        licence: Terms of use, in a few words.
        source: Where the images come from.
        classnames: Class names by label; empty where files beside the images say them.
        class_count: Number of classes where ``classnames`` is empty; 0 where the user's own files decide it.
        templates: Prompt templates with one ``{}`` each.
        counts: Expected images by split (``train``, ``val``, ``test``), validation already taken out of train.
        options: Further arguments of the reader.
        layout: Files expected below the root; empty where nothing is read from disk.
        files: What to fetch; in the order in which it is put into place.
        by_hand: How a person gets what cannot be fetched, a line for each step, with ``{root}``.
        flip: Whether training flips images horizontally unless the user says otherwise.
        own: The user's own images: short runs are always extended, not only few-shot ones.
        captions: The labels are captions rather than classes: recall is what counts.
        package: A Python package that holds the images; empty where none does.
        patterns: The root need not be a path: a pattern or a URL will do.
        note: A remark worth a line in a listing.
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
    files: tuple[Archive, ...] = ()
    by_hand: tuple[str, ...] = ()
    flip: bool = True
    own: bool = False
    captions: bool = False
    patterns: bool = False
    package: str = ""
    note: str = ""

    @property
    def classes(self) -> int | None:
        """Number of classes, or None where the user's own files decide it."""
        return len(self.classnames) or self.class_count or None

    @property
    def download(self) -> bool:
        """Whether ``data get`` fetches it without a person's help."""
        return bool(self.files) and all(file.urls for file in self.files)


def counts(train: int, val: int, test: int) -> dict[str, int]:
    """Images by split."""
    return {"train": train, "val": val, "test": test}
