"""A stored listing is used while it holds, and never otherwise."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from randlora_pl.data.catalog import find
from randlora_pl.data.install import check
from randlora_pl.data.readers import Samples, read
from randlora_pl.data.readers import trees as listing
from randlora_pl.data.sources import Strings
from randlora_pl.utils.machine import cache_folder
from tests.data.conftest import Tree, save_image
from tests.data.readers import BUILDERS
from tests.data.readers.conftest import samples_in
from tests.support.products import in_one_item

must = partial(samples_in, "folder")

SETTLED = listing.SETTLED_NS


@pytest.fixture(autouse=True)
def listings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of stored listings; every tree is large enough and old enough."""
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(listing, "LEAST", 1)
    monkeypatch.setattr(listing, "SETTLED_NS", -(10**12))
    return cache_folder() / "listings"


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many files were listed, each time that some were."""
    counts: list[int] = []
    tree = listing.list_tree

    def counting(paths: list[str], *rest: object) -> listing.Listing:
        counts.append(len(paths))
        return tree(paths, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(listing, "list_tree", counting)
    return counts


def same(first: Samples, second: Samples) -> bool:
    names = [[samples.images.name(row) for row in samples.rows.tolist()] for samples in (first, second)]
    return (
        list(first.keys) == list(second.keys)
        and names[0] == names[1]
        and first.classes == second.classes
        and np.array_equal(first.labels, second.labels)
        and np.array_equal(first.numbers, second.numbers)
    )


def test_the_second_reading_is_the_first(tree: Tree, listed: list[int], caplog: pytest.LogCaptureFixture) -> None:
    root = tree(**{"train/cat": 3, "train/caf\u0065\u0301": 2, "val/cat": 1})
    (root / "train/cat/notes.txt").touch()
    texts = []
    for _ in range(2):
        caplog.clear()
        first, test = must(root), must(root, "test")
        texts.append(caplog.text)
    assert listed == [5, 1]
    assert texts[0] == texts[1] and "1 files in" in texts[0] and "val split is used for testing" in texts[0]
    with listing.ignore_stored():
        assert same(first, must(root)) and same(test, must(root, "test"))
    assert listed == [5, 1, 5, 1]


@pytest.mark.parametrize("name", ["imagenet", "caltech101", "eurosat"])
def test_the_papers_data_sets_too(name: str, tmp_path: Path, listed: list[int]) -> None:
    BUILDERS[name](tmp_path)
    samples = [[read(find(name), tmp_path, split) for split in ("train", "val", "test")] for _ in range(2)]
    before = len(listed)
    assert before in (1, 2)  # of some, all splits are in one folder; of ImageNet two
    for first, second in zip(*samples, strict=True):
        assert (first is None and second is None) or same(first, second)


def turn_link(root: Path) -> None:
    save_image(root.parent / "second" / "other.png")
    (root.parent / "current").unlink()
    (root.parent / "current").symlink_to(root.parent / "second")


def restore_times(root: Path) -> None:
    """As a tool that copies the times of folders."""
    before = (root / "cat").stat()
    save_image(root / "cat" / "new.png")
    os.utime(root / "cat", ns=(before.st_atime_ns, before.st_mtime_ns))


@in_one_item(
    "change",
    [
        lambda root: save_image(root / "cat/new.png"),
        lambda root: (root / "cat/000.png").unlink(),
        lambda root: (root / "cat/000.png").rename(root / "cat/zzz.png"),
        lambda root: save_image(root / "new/0.png"),
        lambda root: save_image(root / "cat/deep/er/new.png"),
        lambda root: (root / "cat").rename(root / "zebra"),
        turn_link,
        restore_times,
    ],
)
def test_every_change_is_noticed(change: Callable[[Path], object], tmp_path: Path, listed: list[int]) -> None:
    root = tmp_path / "images"
    for name in ("cat/0.png", "cat/000.png", "cat/2.png", "cat/deep/er/0.png", "dog/0.png", "dog/1.png"):
        save_image(root / name)
    listed.clear()
    save_image(root.parent / "first" / "one.png")
    (root.parent / "current").symlink_to(root.parent / "first")
    (root / "linked").symlink_to(root.parent / "current")  # a link to a link
    before = must(root)
    assert same(before, must(root)) and listed == [7]
    change(root)
    after = must(root)
    assert len(listed) == 2 and not same(before, after)
    assert same(after, must(root)) and len(listed) == 2


def test_what_has_just_changed_is_not_trusted(tree: Tree, listed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "SETTLED_NS", SETTLED)
    root = tree(cat=3, dog=2)
    must(root)
    must(root)
    assert listed == [5, 5]
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + SETTLED + 10**9)
    must(root)
    must(root)
    assert listed == [5, 5, 5]


@pytest.mark.parametrize(("kind", "count"), [("ext4", 1), ("fuseblk", 1), ("fuse.gcsfuse", 2), ("fuse", 2)])
def test_object_stores_are_listed_each_time(
    kind: str, count: int, tree: Tree, listed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their folders may have the same times whatever is in them."""
    root = tree(cat=3, dog=2)
    device = root.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /data rw shared:1 - {kind} bucket rw\n"
    (tmp_path / "mounts").write_text(line + "and a line of another kind\n")
    found = listing.timeless_devices(str(tmp_path / "mounts"))
    assert listing.timeless_devices(str(tmp_path / "nowhere")) == set()
    monkeypatch.setattr(listing, "timeless_devices", lambda: found)
    must(root)
    must(root)
    assert len(listed) == count


def test_few_files_are_not_worth_it(tree: Tree, listings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "LEAST", 10_000)
    must(tree(cat=3, dog=2))
    assert not listings.exists()


def test_a_check_lists_anew_and_mends_what_is_stored(tree: Tree, listings: Path, listed: list[int]) -> None:
    root = tree(cat=30, dog=20)
    must(root)
    (path,) = listings.iterdir()
    whole = path.read_bytes()
    path.write_bytes(b"")
    assert check(find("folder"), root, 0).problems == []
    assert listed == [50, 50] and len(path.read_bytes()) == len(whole)
    must(root)
    assert listed == [50, 50]


def damage(path: Path) -> Iterator[bytes]:
    whole = path.read_bytes()
    middle = len(whole) // 2
    yield b""
    yield b"\x80\x04no array"
    yield whole[:middle]
    yield whole[: len(whole) - 30]
    place = whole.index(b"cat/000.png")
    yield whole[:place] + b"dog" + whole[place + 3 :]


def test_a_damaged_file_is_harmless(tree: Tree, listings: Path, listed: list[int]) -> None:
    root = tree(cat=3, dog=2)
    expected = must(root)
    (path,) = listings.iterdir()
    for number, content in enumerate(list(damage(path))):
        path.write_bytes(content)
        assert same(expected, must(root)) and len(listed) == number + 2
    assert same(expected, must(root)) and len(listed) == 6 and [path] == list(listings.iterdir())


@pytest.mark.parametrize("place", ["a file", "read-only"])
def test_a_cache_that_cannot_be_written(
    place: str, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "cache"
    if place == "a file":
        blocked.touch()
    else:
        blocked.mkdir()
        monkeypatch.setattr(listing, "atomic_file", lambda *rest: (_ for _ in ()).throw(PermissionError("read-only")))
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(blocked))
    root = tree(cat=3, dog=2)
    with caplog.at_level(logging.DEBUG, "randlora_pl"):
        assert same(must(root), must(root))
    assert "cannot be stored" in caplog.text and not [each for each in caplog.records if each.levelno > logging.DEBUG]


def test_strings_are_what_was_given() -> None:
    for texts in ([], [""], ["a", "", "bc"], ["caf\u00e9", "x", "\udcff.png", "\U0001f40e"]):
        strings = Strings.from_texts(texts)
        assert list(strings) == texts and strings == texts and len(strings) == len(texts)
        assert [strings[place] for place in range(len(texts))] == texts and list(strings[1:]) == texts[1:]
        order = np.arange(len(texts))[::-1]
        assert list(strings.take(order)) == texts[::-1]
    assert Strings.from_texts(["a"]) != Strings.from_texts(["b"]) and Strings.from_texts(["a"]) != 1
    assert json.dumps([Strings.from_texts(["last"])[-1]]) == '["last"]'
