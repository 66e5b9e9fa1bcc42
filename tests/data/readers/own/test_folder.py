import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.data.unlabelled import find_images
from randlora_pl.utils.errors import UserError
from tests.data.conftest import Tree, save_image
from tests.data.readers.conftest import read_split, samples_in

read = partial(read_split, "folder")
must = partial(samples_in, "folder")


def test_classes_are_sub_folders(tree: Tree) -> None:
    root = tree(dog=2, cat=3)
    samples = must(root)
    assert samples.classes == ("cat", "dog") and samples.labels.tolist() == [0, 0, 0, 1, 1]
    assert samples.keys == ["cat/000.png", "cat/001.png", "cat/002.png", "dog/000.png", "dog/001.png"]
    assert samples.images.name(int(samples.rows[3])).endswith("dog/000.png")
    assert read(root, "val") is None and read(root, "test") is None


def test_suffixes_hidden_files_nesting_and_links(tree: Tree, tmp_path: Path) -> None:
    root = tree(cat=1)
    save_image(root / "cat" / "B.JPG")
    save_image(root / "cat" / ".hidden.png")
    save_image(root / "cat" / "deeper" / "c.webp")
    save_image(root / "cat" / ".cache" / "d.png")
    save_image(root / ".git" / "e.png")
    (root / "cat" / "notes.txt").write_text("no image")
    save_image(tmp_path / "elsewhere" / "f.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    samples = must(root)
    assert samples.keys == ["cat/000.png", "cat/B.JPG", "cat/deeper/c.webp", "linked/f.png"]
    assert samples.classes == ("cat", "linked")


def test_split_folders(tree: Tree) -> None:
    root = tree(**{"train/cat": 3, "train/dog": 2, "valid/dog": 1, "test/cat": 2, "test/dog": 1})
    assert [len(must(root, split)) for split in ("train", "val", "test")] == [5, 1, 3]
    assert must(root, "val").labels.tolist() == [1]


def test_lone_validation_folder_is_for_testing(tree: Tree, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(**{"Train/cat": 3, "VAL/cat": 2})
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        assert len(must(root, "test")) == 2
    assert read(root, "val") is None and "its val split is used for testing" in caplog.text


def test_missing_and_wrong_folders(tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data.root"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        read(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="folders"):
        read(tmp_path / "empty")
    save_image(tmp_path / "loose" / "a.png")
    with pytest.raises(UserError, match="sub-folder"):
        read(tmp_path / "loose")
    with pytest.raises(UserError, match="images"):
        read(tree(cat=2, dog=0))


def test_class_in_test_only(tree: Tree) -> None:
    root = tree(**{"train/cat": 2, "train/dog": 2, "test/cat": 1, "test/dgo": 1})
    with pytest.raises(UserError, match=r"'dog'\?"):
        read(root, "test")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train": 3, "test": 2}, "train has no class folders, so its images have no labels"),
        ({"cat": 2, "dog": 2, "test/cat": 1, "test/dog": 1}, "test has class folders, but .*train"),
        ({"flowers/a": 2, "flowers/b": 2}, "Did you mean --data.root .*flowers"),
    ],
)
def test_split_folders_are_not_taken_for_classes(tree: Tree, counts: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tree(**counts))


def test_a_class_may_have_the_name_of_a_split(tree: Tree) -> None:
    assert must(tree(train=2, car=2)).classes == ("car", "train")
    shutil.rmtree(tree())
    assert must(tree(test=2, exam=2)).classes == ("exam", "test")


def test_a_link_to_a_folder_above_adds_nothing(tree: Tree) -> None:
    root = tree(a=3, b=1)
    (root / "a" / "again").symlink_to(root / "a")
    assert len(must(root)) == 4


def test_files_that_are_no_images_are_mentioned(tree: Tree, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(a=1, b=1)
    for name in ("1.heic", "2.heic", "notes.txt", ".hidden"):
        (root / "a" / name).touch()
    save_image(root / "b" / "photo.png").rename(root / "b" / "photo.jfif")
    assert len(must(root)) == 3
    assert "3 files" in caplog.text and "mostly .heic" in caplog.text


def test_accents_compare_however_they_are_stored(tree: Tree) -> None:
    root = tree(**{"train/caf\u00e9": 2, "train/tea": 1, "test/cafe\u0301": 1})
    assert must(root, "test").classes == must(root).classes == ("caf\u00e9", "tea")
    assert must(root, "test").keys == ["caf\u00e9/000.png"]


def test_a_folder_that_may_not_be_listed_is_named(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(cat=2, dog=2)
    (root / "cat" / "locked").mkdir()
    plain = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="locked cannot be listed"):
        find_images([root])
    with pytest.raises(UserError, match="locked cannot be listed"):
        read(root)
