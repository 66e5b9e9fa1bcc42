"""Emoji by skin tone, name and group: what is held out, few shots of small classes, and damaged lists."""

import json
import random
import re
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from randlora_pl.data.catalog import default_root, find
from randlora_pl.data.install import check
from randlora_pl.data.readers import Samples, read
from randlora_pl.data.readers.lists import kinds, names, tones
from randlora_pl.data.splits import Splits, subset
from randlora_pl.models.clip import tiny_tokenizer
from randlora_pl.utils.errors import UserError
from tests.data.readers.conftest import Copies
from tests.data.readers.pictures import Writer

VENDORS = ("google", "apple", "twitter", "facebook")
FOUR = ("emoji_names", "emoji_names_mixed", "emoji_groups", "emoji_subgroups")


def emoji(code: int, name: str, kind: str = "Animals & Nature/animal-bug", no: str = "", **more: Any) -> dict[str, Any]:
    """An entry of ``emoji.json``: drawn by all vendors but ``no``, in the yellow and the medium tone."""
    category, _, subcategory = kind.partition("/")
    drawn = {f"has_img_{vendor}": vendor != no for vendor in VENDORS}
    medium = {"1F3FD": {"image": f"{code:x}-1f3fd.png"} | drawn}
    entry = {"name": None, "short_names": [name], "unified": f"{code:X}", "image": f"{code:x}.png", **drawn}
    return entry | {"category": category, "subcategory": subcategory, "skin_variations": medium} | more


def write(root: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write the list, and the image files of all vendors."""
    draw = Writer()
    for entry in entries:
        for label, vendor in enumerate(VENDORS):
            if entry[f"has_img_{vendor}"]:
                draw(root / "emoji/img" / vendor / "64" / entry["image"], label)
    (root / "emoji/emoji.json").write_text(json.dumps(list(entries)))


def test_one_skin_tone_is_held_out(copies: Copies, caplog: pytest.LogCaptureFixture) -> None:
    copy = copies("emoji_tones")
    test = copy.samples("test")
    assert test.keys[:2] == ["1f000-1f3fd.png", "1f001-1f3fd.png"] and len(test) == 313
    splits = Splits(copy.read)
    assert (len(splits.train), len(splits.val)) == (1409, 156)
    assert not any("1f3fd" in key for key in (*splits.train.keys, *splits.val.keys))
    for shots in (4, 16):  # classes have 4 or 5 images
        chosen = subset(splits.train, shots, None, 0, splits.train.classes)
        assert set(np.bincount(chosen.labels).tolist()) <= ({4} if shots == 4 else {4, 5})
    assert "313 of 313 classes have fewer than 16 images" in caplog.text
    problems = "\n".join(str(problem) for problem in check(copy.row, copy.root, 0).problems)
    assert "expected" in problems and "classes have no" not in problems  # fewer validation images than classes


def test_couples_are_held_out_if_either_has_the_tone(own_copy: Copies) -> None:
    copy = own_copy("emoji_tones")
    path = copy.root / "emoji/emoji.json"
    entries = json.loads(path.read_text())
    couple: dict[str, Any] = next(entry for entry in entries if entry["image"] == "1f000.png")
    variants = couple["skin_variations"]
    couple["skin_variations"] = dict(
        zip(["1F3FB-1F3FD", "1F3FD-1F3FD", "1F3FC-1F3FE", "1F3FD", "1F3FF"], variants.values(), strict=True)
    )
    path.write_text(json.dumps(entries))
    assert [int((copy.samples(split).labels == 0).sum()) for split in ("train", "test")] == [3, 3]


def test_names_leave_room_for_prompts() -> None:
    ids = tiny_tokenizer()(["an emoji of woman in motorized wheelchair."])  # the longest of the real names
    assert ids.shape == (1, 16) and ids[0, -1] == ids.max()


def test_damaged_lists_are_named(own_copy: Copies, subtests: pytest.Subtests) -> None:
    copy = own_copy("emoji_tones")
    path = copy.root / "emoji/emoji.json"
    entry = emoji(0x1F000, "a")
    first = f"{path} has other content: "
    wrong: list[dict[str, Any]] = [{"short_names": []}, {"short_names": [1]}, {"image": None}, {"unified": 1}]
    wrong += [{"skin_variations": []}, {"category": 3}, {"category": None}, {"subcategory": ["animal-bug"]}]
    for content, why in (
        ("[{", f"{path} cannot be read: "),
        ("{}", f"{path} cannot be read: it is not a list"),
        ('["a"]', f"{path} has other content: TypeError: "),
        (json.dumps([entry | {"image": "../1f000.png"}]), "'../1f000.png' is not the name of an image"),
        (json.dumps([{"name": "A", "short_names": ["a"]}]), f"{first}KeyError: 'has_img_google'"),
        *((json.dumps([entry | part]), first) for part in wrong),
    ):
        with subtests.test(content):
            path.write_text(content)
            with pytest.raises(UserError) as caught:
                copy.read("train")
            assert why in str(caught.value) and len(str(caught.value).splitlines()) == 2
    path.unlink()
    with pytest.raises(UserError, match=r"emoji\.json does not exist"):
        tones(copy.row, copy.root, "train", **copy.row.options)
    with pytest.raises(UserError, match="missing or damaged"):
        copy.read("test")


def test_missing_images_are_counted(own_copy: Copies) -> None:
    copy = own_copy("emoji_tones")
    path = copy.root / "emoji/img/google/64/1f007.png"
    path.unlink()
    with pytest.raises(UserError, match=f"1 of 1565 images of .*emoji.json do not exist, the first: {path}"):
        copy.read("train")


def test_names_are_learned_from_some_vendors_and_tested_on_others(tmp_path: Path) -> None:
    entries = [
        emoji(2, "spider"),
        emoji(1, "ant-hill") | {"name": "ANT"},
        emoji(3, "bug", no="facebook"),
        emoji(4, "mouse"),
        emoji(5, "mouse2") | {"name": "MOUSE"},
        emoji(6, "flag", "Flags/flag"),
        emoji(7, "man-boy", "People & Body/family"),
        emoji(8, "family", "People & Body/person-symbol"),
        emoji(9, "runner", obsoleted_by="1F3C3-200D-2642"),
        emoji(10, "two_words"),
        emoji(11, "keycap_1"),
    ]
    write(tmp_path, entries)
    row = find("emoji_names")

    def found(split: str) -> Samples | None:
        return names(row, tmp_path, split, **row.options)

    assert found("val") is None
    for split, vendors in (("train", ("google", "twitter")), ("test", ("apple", "facebook"))):
        samples = found(split)
        assert samples is not None and samples.classes == ("ant", "spider")
        pairs = [(f"{vendor}/64/{code}.png", label) for vendor in vendors for label, code in enumerate((1, 2))]
        assert list(zip(samples.keys, samples.labels.tolist(), strict=True)) == pairs
        assert samples.images.load(int(samples.rows[0])).ndim == 3
    shutil.rmtree(tmp_path / "emoji/img/apple")
    assert found("train") is not None
    lacking = f"2 of 4 images of .*emoji.json do not exist, the first: {tmp_path}/emoji/img/apple/64/1.png"
    with pytest.raises(UserError, match=lacking) as caught:
        found("test")
    assert len(str(caught.value).splitlines()) == 2


def test_groups_hold_emoji_out(tmp_path: Path) -> None:
    sizes = {"Animals & Nature/animal-bug": 20, "Food & Drink/food": 6, "Symbols/arrow": 5, "Flags/flag": 20}
    entries = [
        emoji(1000 * number + place, "any", kind, no="apple" if place == 3 else "")
        for number, (kind, size) in enumerate(sizes.items(), 1)
        for place in range(size)
    ]
    write(tmp_path, entries)

    def read_splits(name: str) -> list[Samples]:
        row = find(name)
        return [kinds(row, tmp_path, split, **row.options) for split in ("train", "val", "test")]

    assert read_splits("emoji_subgroups")[0].classes == ("animal bug", "food")
    found = read_splits("emoji_groups")
    assert found[0].classes == ("animals and nature", "food and drink")
    codes = [{int(key[:-4].rpartition("/")[2], 16) for key in samples.keys} for samples in found]
    counts = [[sum(code // 1000 == number for code in part) for number in (1, 2)] for part in codes]
    assert counts == [[14, 4], [2, 1], [4, 1]]  # 20 and 6 emoji, each in one split
    assert len(set.union(*codes)) == 26 and sum(map(len, found)) == 4 * 26 - 2  # Apple has not drawn two of them
    for samples in found:
        assert samples.labels.tolist() == [int(key[:-4].rpartition("/")[2], 16) // 1000 - 1 for key in samples.keys]
    random.Random(0).shuffle(entries)
    write(tmp_path, [*entries, *(emoji(5000 + place, "any", "Objects/tool") for place in range(9))])
    kept = [
        [key for key in samples.keys if not re.search(r"/13[89a-f]\w\.", key)]
        for samples in read_splits("emoji_groups")
    ]
    assert kept == [list(samples.keys) for samples in found]


@pytest.mark.skipif(
    not all((default_root() / "emoji/img" / vendor).is_dir() for vendor in VENDORS),
    reason="the packages of four vendors are not at hand: randlora-pl data get emoji_names",
)
def test_real_emoji_are_as_described(subtests: pytest.Subtests) -> None:
    for name in ("emoji_tones", *FOUR):
        with subtests.test(name):
            row, root = find(name), default_root()
            assert check(row, root, 0).problems == []
            splits = Splits(partial(read, row, root))
            captions = tiny_tokenizer()([row.templates[0].format(name) for name in splits.test.classes])
            assert len(captions.unique(dim=0)) == row.classes  # the tiny CLIP tells all names apart
            drawings = [
                {samples.images.load(number).tobytes() for number in samples.rows.tolist()}
                for samples in (splits.train, splits.val, splits.test)
            ]
            assert name == "emoji_tones" or not drawings[2] & (drawings[0] | drawings[1])
