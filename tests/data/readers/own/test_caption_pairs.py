from pathlib import Path

import numpy as np
import pytest

from randlora_pl.data.catalog import find
from randlora_pl.data.readers import Samples
from randlora_pl.data.readers.table import pairs
from randlora_pl.data.splits import Splits
from randlora_pl.utils.errors import UserError
from tests.data.conftest import save_image
from tests.support.products import in_one_item


def write(folder: Path, text: str, images: int = 3) -> Path:
    for number in range(images):
        save_image(folder / "images" / f"{number}.png", number)
    (folder / "pairs.csv").write_text(text, encoding="utf-8-sig")
    return folder / "pairs.csv"


def read(path: Path, split: str = "train") -> Samples | None:
    return pairs(find("pairs"), path, split)


def test_captions_are_numbered_over_all_splits(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'image,caption,split\nimages/1.png,"a dog, asleep",train\nimages/0.png,a cat,train\n'
        "images/0.png,an animal,train\nimages/2.png,a cat,test\n",
    )
    train, test = read(path), read(path, "test")
    assert train is not None and test is not None and read(path, "val") is None
    assert train.classes == test.classes == ("a cat", "a dog, asleep", "an animal")
    assert train.labels.tolist() == [0, 2, 1] and test.labels.tolist() == [0]
    assert train.rows.tolist() == [0, 0, 1] and test.rows.tolist() == [2]
    assert train.images.name(1).endswith("images/1.png") and train.images.load(1).shape == (16, 20, 3)


def test_captions_of_an_image_stay_in_one_split(tmp_path: Path) -> None:
    lines = [f"images/{number}.png,caption {number} {variant}" for number in range(20) for variant in range(3)]
    path = write(tmp_path, "image,caption\n" + "\n".join(reversed(lines)), images=20)
    found = Splits(lambda split: read(path, split))
    parts = [set(part.rows.tolist()) for part in (found.train, found.val, found.test)]
    assert [len(part) for part in parts] == [15, 1, 4] and len(set.union(*parts)) == 20
    assert len(found.test) == 12
    again = Splits(lambda split: read(write(tmp_path, "image,caption\n" + "\n".join(lines), 20), split))
    assert again.test.keys == found.test.keys and np.array_equal(again.test.labels, found.test.labels)


@in_one_item(
    ("text", "message"),
    [
        ("image,captoin\nimages/0.png,a", r"line 1: no column 'caption' among image, captoin. Did you mean 'captoin'"),
        ("", r"line 1: no column 'image' among none"),
        ("image,caption\nimages/0.png,a\nimages/1.png,\n", "line 3: the caption is empty"),
        ("image,caption\n,a\n", "line 2: the image is empty"),
        ("image,caption\nimages/0.png,a,b\n", r"line 2: expected 2 fields \(image,caption\); quote commas"),
        ("image,caption,split\nimages/0.png,a\n", "line 2: expected 3 fields"),
        ("image,caption,split\nimages/0.png,a,tran\n", "line 2: unknown split 'tran'"),
        ("image,caption\nimages/9.png,a\nimages/0.png,b\nimages/8.png,c\n", r"2 image files do not .*line 2: .*9.png"),
        ("image,caption\n", "has no rows below its header"),
        ("image,caption,split\nimages/0.png,a,test\n", "no line of the split 'train'"),
    ],
)
def test_wrong_lines_are_numbered(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, text))


def test_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.csv"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)
    path = tmp_path / "binary.csv"
    path.write_bytes(b"image,caption\n\xff\xfe\x00,b\n")
    with pytest.raises(UserError, match="cannot be read"):
        read(path)


@pytest.mark.parametrize("second", ["images/0.png", "./images/0.png", "images/../images/0.png"])
def test_an_image_in_two_splits_is_refused(tmp_path: Path, second: str) -> None:
    path = write(tmp_path, f"image,caption,split\nimages/0.png,a cat,train\n{second},a dog,test\n")
    with pytest.raises(UserError, match=r"images/0.png"):
        read(path)
