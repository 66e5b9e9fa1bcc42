"""Emoji of the npm packages ``emoji-datasource-VENDOR``: ``emoji.json``, and a folder of images for each vendor."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.readers.dispatch import Samples, file_samples, missing
from randlora_pl.utils.errors import brief
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.files.plain_files import read_plain

LARGEST = 1 << 26
"""Maximum size of ``emoji.json`` in bytes; it has 1.3 million."""

_LIST, _IMAGES = Path("emoji", "emoji.json"), Path("emoji", "img")


@dataclass(frozen=True)
class Emoji:
    """One emoji.

    Attributes:
        code: Its code points, such as ``1F44B``.
        name: Its name or its first short name, whichever has fewer words; empty if neither has letters and spaces only.
        kinds: Its ``category`` and ``subcategory`` as class names.
        alike: True if it may be drawn exactly like another: flags, families, and emoji that another one replaces.
        images: File name of the image for each vendor and choice of skin tones, such as ``1F3FB`` or ``1F3FB-1F3FE``;
            the tone of the yellow one is empty.
    """

    code: str
    name: str
    kinds: dict[str, str]
    alike: bool
    images: dict[tuple[str, str], str]

    def named(self, words: int) -> bool:
        """Return True if it has a name of at most this many words."""
        return 0 < len(self.name.split()) <= words


def tones(row: DatasetSpec, root: Path, split: str, *, vendor: str, held_out: str, words: int) -> Samples | None:
    """Read the emoji that have skin tones; images with the tone ``held_out`` are for the test, all others for training.

    The classes are sorted by name. Of an emoji with two people, each image in which either has this tone is held out.
    Emoji whose name has more than ``words`` words are left out.
    """
    if split == "val":
        return None
    found = sorted(listed(row, root, [vendor]), key=lambda emoji: emoji.name)
    kept = [emoji for emoji in found if len(emoji.images) > 1 and emoji.named(words)]
    entries = [
        (image, label)
        for label, emoji in enumerate(kept)
        for (_, tone), image in emoji.images.items()
        if (held_out in tone) == (split == "test")
    ]
    home = root / _IMAGES / vendor / "64"
    return file_samples(row, root, home, entries, [emoji.name for emoji in kept], str(root / _LIST))


def names(
    row: DatasetSpec, root: Path, split: str, *, train: Sequence[str], test: Sequence[str], words: int
) -> Samples | None:
    """Read the emoji without skin tones by name: the images of some vendors for training, of others for the test.

    The classes are sorted by name. An emoji is left out if a vendor has not drawn it, if it may look exactly like
    another, and if its name has more than ``words`` words or is another's, too.
    """
    if split == "val":
        return None
    found = [
        emoji
        for emoji in listed(row, root, [*train, *test])
        if not emoji.alike and emoji.named(words) and all((vendor, "") in emoji.images for vendor in (*train, *test))
    ]
    often = Counter(emoji.name for emoji in found)
    kept = sorted((emoji for emoji in found if often[emoji.name] == 1), key=lambda emoji: emoji.name)
    entries = [
        (f"{vendor}/64/{emoji.images[vendor, '']}", label)
        for label, emoji in enumerate(kept)
        for vendor in (test if split == "test" else train)
    ]
    return file_samples(row, root, root / _IMAGES, entries, [emoji.name for emoji in kept], str(root / _LIST))


def kinds(row: DatasetSpec, root: Path, split: str, *, kind: str, vendors: Sequence[str], fewest: int) -> Samples:
    """Read the emoji without skin tones by ``kind``: ``category`` or ``subcategory``. Each is in one split only.

    The classes are sorted by name, and those with less than ``fewest`` emoji are left out. The SHA-256 of their codes
    orders the emoji of a class: the first fifth is for the test and the next tenth, at least one, for validation.
    Emoji that may look exactly like another are left out.
    """
    members = defaultdict(list)
    for emoji in sorted(listed(row, root, vendors), key=_draw):
        if not emoji.alike:
            members[emoji.kinds[kind]].append(emoji)
    classes = sorted(name for name, emoji in members.items() if len(emoji) >= fewest)
    entries = []
    for label, name in enumerate(classes):
        test = len(members[name]) // 5
        val = test + max(1, len(members[name]) // 10)
        part = {"test": slice(test), "val": slice(test, val), "train": slice(val, None)}[split]
        for emoji in members[name][part]:
            images = [(vendor, emoji.images.get((vendor, ""))) for vendor in vendors]
            entries += [(f"{vendor}/64/{image}", label) for vendor, image in images if image]
    return file_samples(row, root, root / _IMAGES, entries, classes, str(root / _LIST))


def listed(row: DatasetSpec, root: Path, vendors: Sequence[str]) -> list[Emoji]:
    """Return the emoji in the list that any of these vendors has drawn, with the images of these vendors."""
    path = root / _LIST
    try:
        content = parse_json(read_plain(path, LARGEST))
        if not isinstance(content, list):
            raise ValueError("it is not a list")
        return [emoji for entry in content if (emoji := _emoji(entry, vendors)).images]
    except FileNotFoundError as error:
        raise missing(row, root, f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise missing(row, root, f"{path} cannot be read: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise missing(row, root, f"{path} has other content: {type(error).__name__}: {error}") from error


def _emoji(entry: dict[str, Any], vendors: Sequence[str]) -> Emoji:
    names = (entry["short_names"][0].replace("-", " ").replace("_", " "), (entry["name"] or "").lower())
    plain = [name for name in names if re.fullmatch("[a-z]+( [a-z]+)*", name)]
    variants = {"": entry, **entry.get("skin_variations", {})}
    images = {
        (vendor, tone): variant["image"]
        for vendor in vendors
        for tone, variant in variants.items()
        if variant[f"has_img_{vendor}"]
    }
    for image in images.values():
        if not re.fullmatch(r"[0-9a-f-]+\.png", image):  # such as 1f44b-1f3fd.png
            raise ValueError(f"{brief(image)} is not the name of an image")
    kinds = {kind: _class_name(entry[kind]) for kind in ("category", "subcategory")}
    alike = (
        "obsoleted_by" in entry or kinds["category"] == "flags" or kinds["subcategory"] in ("family", "person symbol")
    )
    return Emoji(
        entry["unified"].lower(), min(plain, key=lambda name: len(name.split()), default=""), kinds, alike, images
    )


def _draw(emoji: Emoji) -> bytes:
    return hashlib.sha256(emoji.code.encode(errors="replace")).digest()


def _class_name(kind: str) -> str:
    """Return a category as a class name: ``sky & weather`` is ``sky and weather``, ``animal-bug`` is ``animal bug``."""
    return kind.lower().replace("&", "and").replace("-", " ")
