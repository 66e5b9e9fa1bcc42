"""Datasets of emoji, in the drawings of one vendor or of four."""

from typing import Any

from randlora_pl.data.catalog import templates as prompts
from randlora_pl.data.catalog.spec import DatasetSpec, counts

_VENDORS = ("google", "apple", "twitter", "facebook")


def _row(name: str, reader: str, vendors: tuple[str, ...], **more: Any) -> DatasetSpec:
    """Return a row of these vendors' images; the first vendor's package has the list, too."""
    packages = {vendor: f"emoji-datasource-{vendor}" for vendor in vendors}
    folders = {vendor: f"package/img/{vendor}/64" for vendor in vendors}
    folders[vendors[0]] = f"package/emoji.json {folders[vendors[0]]}"
    several = "{{{}}}" if len(vendors) > 1 else "{}"
    return DatasetSpec(
        name=name,
        reader=f"randlora_pl.data.readers.emoji:{reader}",
        epochs=10,  # not in the paper: as its few-shot runs
        source="https://github.com/iamcal/emoji-data",
        templates=prompts.EMOJI,
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
    """Return a row of all vendors' images."""
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

ROWS = (
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
