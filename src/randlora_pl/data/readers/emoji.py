"""Emoji of the npm packages ``emoji-datasource-VENDOR``: ``emoji.json``, and a folder of images for each vendor."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.readers.common import file_samples
from randlora_pl.data.readers.dispatch import Samples, missing
from randlora_pl.utils.errors import brief
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.files.plain_files import read_plain

LARGEST = 1 << 26
"""Maximum size of ``emoji.json`` in bytes; it has 1.3 million."""


@dataclass(frozen=True)
class Emoji:
    """One emoji of a vendor.

    Attributes:
        name: Its name or its first short name, whichever has fewer words; empty if neither has letters and spaces only.
        images: File name of the image for each choice of skin tones, such as ``1F3FB`` or ``1F3FB-1F3FE``; the key of
            the yellow one is empty.
    """

    name: str
    images: dict[str, str]


def tones(row: DatasetSpec, root: Path, split: str, *, vendor: str, held_out: str, words: int) -> Samples | None:
    """Read the emoji that have skin tones; images with the tone ``held_out`` are for the test, all others for training.

    The classes are sorted by name. Of an emoji with two people, each image in which either has this tone is held out.
    Emoji whose name has more than ``words`` words are left out.
    """
    if split == "val":
        return None
    home, path = root / "emoji" / "img" / vendor / "64", root / "emoji" / "emoji.json"
    found = sorted(listed(row, root, path, vendor), key=lambda emoji: emoji.name)
    kept = [emoji for emoji in found if len(emoji.images) > 1 and 0 < len(emoji.name.split()) <= words]
    entries = [
        (image, label)
        for label, emoji in enumerate(kept)
        for tone, image in emoji.images.items()
        if (held_out in tone) == (split == "test")
    ]
    return file_samples(row, root, home, entries, [emoji.name for emoji in kept], str(path))


def listed(row: DatasetSpec, root: Path, path: Path, vendor: str) -> list[Emoji]:
    """Return the emoji in a list that a vendor has drawn."""
    try:
        content = parse_json(read_plain(path, LARGEST))
        if not isinstance(content, list):
            raise ValueError("it is not a list")
        return [_emoji(entry, vendor) for entry in content if entry[f"has_img_{vendor}"]]
    except FileNotFoundError as error:
        raise missing(row, root, f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise missing(row, root, f"{path} cannot be read: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise missing(row, root, f"{path} has other content: {type(error).__name__}: {error}") from error


def _emoji(entry: dict[str, Any], vendor: str) -> Emoji:
    names = (entry["short_names"][0].replace("-", " ").replace("_", " "), (entry["name"] or "").lower())
    plain = [name for name in names if re.fullmatch("[a-z]+( [a-z]+)*", name)]
    variants = {"": entry, **entry.get("skin_variations", {})}
    images = {tone: variant["image"] for tone, variant in variants.items() if variant[f"has_img_{vendor}"]}
    for image in images.values():
        if not re.fullmatch(r"[0-9a-f-]+\.png", image):  # such as 1f44b-1f3fd.png
            raise ValueError(f"{brief(image)} is not the name of an image")
    return Emoji(min(plain, key=lambda name: len(name.split()), default=""), images)
