"""Emoji by skin tone: what is held out, few shots of small classes, and damaged lists."""

import json
from typing import Any

import numpy as np
import pytest

from randlora_pl.data.check import check
from randlora_pl.data.readers.emoji import tones
from randlora_pl.data.sampling.splits import Splits, subset
from randlora_pl.models.tiny import tiny_tokenizer
from randlora_pl.utils.errors import UserError
from tests.data.readers.conftest import Copies


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
    entry = {"name": "A", "short_names": ["a"], "image": "1f000.png", "has_img_google": True}
    for content, why in (
        ("[{", f"{path} cannot be read: "),
        ("{}", f"{path} cannot be read: it is not a list"),
        ('["a"]', f"{path} has other content: TypeError: "),
        (json.dumps([entry | {"image": "../1f000.png"}]), "'../1f000.png' is not the name of an image"),
        (json.dumps([{"name": "A"}]), "has other content: KeyError: 'has_img_google'"),
        (json.dumps([entry | {"short_names": []}]), f"{path} has other content: "),
        (json.dumps([entry | {"short_names": [1]}]), f"{path} has other content: "),
        (json.dumps([entry | {"image": None}]), f"{path} has other content: "),
        (json.dumps([entry | {"skin_variations": []}]), f"{path} has other content: "),
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
