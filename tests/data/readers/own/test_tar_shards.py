"""Tar shards are read like any other dataset, wherever they lie."""

import io
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from randlora_pl.data import ImageData
from randlora_pl.data.catalog import find
from randlora_pl.data.install import check
from randlora_pl.data.readers import tar_shards as tars
from randlora_pl.data.readers import trees as listing
from randlora_pl.data.readers.trees import folder
from randlora_pl.data.splits import Splits
from randlora_pl.utils.errors import UserError
from tests.data.conftest import Tree
from tests.data.readers.conftest import pixels, read_split, samples_in
from tests.data.readers.own.tars import picture, write_shards, write_tar
from tests.support.products import in_one_item

read = partial(read_split, "webdataset")
must = partial(samples_in, "webdataset")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(listing, "SETTLED_NS", -(10**12))  # trust files that have just been written


def test_samples_are_images_with_labels(tmp_path: Path) -> None:
    write_shards(tmp_path, 20)
    samples = must(tmp_path)
    assert samples.keys == [f"{number:06d}.png" for number in range(20)]
    assert samples.labels.tolist() == [number % 3 for number in range(20)]
    assert samples.classes == ("class 0", "class 1", "class 2")
    assert samples.images.name(8) == f"{tmp_path}/train-000001.tar:000008.png" and len(samples.images) == 20
    for number in (0, 19):
        expected = np.asarray(Image.open(io.BytesIO(picture(number))))
        assert np.array_equal(samples.images.load(number), expected)
    assert read(tmp_path, "val") is None and read(tmp_path, "test") is None


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_strange_names(tmp_path: Path, form: int) -> None:
    long = "a" * 90 + "/" + "b" * 90
    write_tar(
        tmp_path / "0.tar",
        *((f"./{long}.PNG", picture(0)), (f"./{long}.cls", "0"), ("x/.hidden.png", b""), ("__MACOSX/a.png", b"")),
        *(("x/é.seg.png", b"a mask"), ("x/é.jpg", picture(1)), ("x/é.json", {"label": 1}), ("x/é.txt", "words")),
        form=form,
    )  # fmt: skip
    samples = must(tmp_path)
    assert list(samples.keys) == [f"{long}.PNG", "x/é.jpg"] and samples.labels.tolist() == [0, 1]
    assert len(pixels(samples)) == 2


def test_the_same_draws_as_from_a_folder(tree: Tree, tmp_path: Path) -> None:
    """Keys, labels, splits, shots and batches are those of the images in folders."""
    root = tree(cat=13, dog=9)
    files = sorted(root.rglob("*.png"), key=lambda path: path.name)  # classes mixed, as in shuffled shards
    members = [(str(path.relative_to(root)), path.read_bytes()) for path in files]
    labels = [(str(path.relative_to(root).with_suffix(".cls")), path.parent.name) for path in files]
    both = [item for pair in zip(members, labels, strict=True) for item in pair]
    write_tar(tmp_path / "tars/0.tar", *both[:20])
    write_tar(tmp_path / "tars/1.tar", *both[20:])
    modules = []
    for name, place in (("folder", root), ("webdataset", tmp_path / "tars")):
        data = ImageData(dataset=name, root=str(place), shots=3, steps=3, batch_size=4, image_size=8, num_workers=0)
        data.prepare_data()
        data.setup()
        modules.append(data)
    first, second = modules
    assert first.classnames == second.classnames == ["cat", "dog"]
    for split in ("train", "val", "test"):
        assert list(first.samples(split).keys) == list(second.samples(split).keys)
        assert np.array_equal(first.samples(split).labels, second.samples(split).labels)
    for one, other in zip(first.train_dataloader(), second.train_dataloader(), strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])
    whole = folder(find("folder"), root, "train")
    assert whole is not None and np.array_equal(whole.numbers, must(tmp_path / "tars").numbers)


def test_test_samples_are_in_the_order_of_the_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, 6)
    for number, names in enumerate(("zc", "yb", "xa")):
        members = [(f"{name}.{suffix}", content) for name in names for suffix, content in
                   (("png", picture(number)), ("cls", "1"))]  # fmt: skip
        write_tar(tmp_path / f"test-{number}.tar", *members)
    samples = must(tmp_path, "test")
    assert list(samples.keys) == [f"{name}.png" for name in "zcybxa"]
    again = must(tmp_path, "test")  # the stored index
    assert again.keys == samples.keys and pixels(again) == pixels(samples)


def layout(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        members = [(f"{number}{letter}.{suffix}", content) for letter in "ab"
                   for suffix, content in (("png", picture(number)), ("cls", str("ab".index(letter))))]  # fmt: skip
        write_tar(root / name, *members)
    return root


@pytest.mark.parametrize(
    "names",
    [
        ("train-000000.tar", "val-000000.tar", "test-000000.tar"),
        ("train/0.tar", "validation/0.tar", "test/0.tar"),
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar", "imagenet1k_testing_00.tar"),
    ],
)
def test_splits_are_words_of_names_or_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    layout(tmp_path, *names)
    assert [list(must(tmp_path, split).keys) for split in ("train", "val", "test")] == [
        [f"{number}a.png", f"{number}b.png"] for number in range(3)
    ]


def test_the_folder_of_all_shards_says_no_split(tmp_path: Path) -> None:
    layout(tmp_path / "test", "0.tar", "1.tar")
    for root in (tmp_path / "test", tmp_path / "test/*.tar", tmp_path / "test/{0,1}.tar"):
        assert len(must(root)) == 4 and read(root, "test") is None
    layout(tmp_path / "whole", "train/0.tar", "test/1.tar")
    assert len(must(tmp_path / "whole/*/*.tar", "test")) == len(must(tmp_path / "whole", "test")) == 2


def test_lone_validation_shards_are_for_testing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout(tmp_path, "train-0.tar", "val-0.tar")
    assert list(must(tmp_path, "test").keys) == ["1a.png", "1b.png"] and read(tmp_path, "val") is None
    assert "its val split is used for testing" in caplog.text


def test_testing_needs_no_train_shards_where_the_classes_are_named(tmp_path: Path) -> None:
    layout(tmp_path, "test-0.tar")
    with pytest.raises(UserError, match=r"classnames.txt"):
        must(tmp_path, "test")
    (tmp_path / "classnames.txt").write_text("tench\nshark\nhen\n")
    data = ImageData(dataset="webdataset", root=str(tmp_path))
    data.prepare_data()
    data.setup("test")
    assert data.classnames == ["tench", "shark", "hen"] and len(data.samples("test")) == 2
    with pytest.raises(UserError, match="shards"):
        ImageData(dataset="webdataset", root=str(tmp_path)).setup("fit")


def test_patterns_and_lists_name_shards_on_several_disks(tmp_path: Path) -> None:
    layout(tmp_path, "disk1/train-008.tar", "disk1/train-009.tar", "disk2/train-010.tar", "disk2/test-0.tar")
    for root in (f"{tmp_path}/disk{{1,2}}/*.tar", f"{tmp_path}/disk*/t*.tar"):
        assert len(must(Path(root))) == 6 and len(must(Path(root), "test")) == 2
    assert len(must(Path(f"{tmp_path}/disk1/train-{{008..009}}.tar"))) == 4
    assert len(must(tmp_path / "disk2/train-010.tar")) == 2
    (tmp_path / "list.txt").write_text(f"# both\ndisk1/train-{{008..009}}.tar\n\n{tmp_path}/disk2/*.tar\n")
    assert len(must(tmp_path / "list.txt")) == 6
    ImageData(dataset="webdataset", root=f"{tmp_path}/disk{{1,2}}/*.tar").setup()


@pytest.mark.parametrize("name", ["v [2]", "{a,b}", "a,b", "what?", "x*"])
def test_a_list_in_a_folder_with_a_strange_name(tmp_path: Path, name: str) -> None:
    layout(tmp_path / name, "train-0.tar", "train-1.tar", "deep/test-2.tar")
    (tmp_path / name / "list.txt").write_text("train-{0..1}.tar\n*/test-[0-9].tar\n")
    assert len(must(tmp_path / name / "list.txt")) == 4 and len(must(tmp_path / name / "list.txt", "test")) == 2


def test_a_name_in_several_shards_is_told_apart_by_the_shard(tmp_path: Path) -> None:
    for number in (0, 1):
        write_tar(tmp_path / f"{number}.tar", ("a.png", picture(number)), ("a.cls", "0"),
                  (f"b{number}.png", picture(9)), (f"b{number}.cls", "1"))  # fmt: skip
    samples = must(tmp_path)
    assert list(samples.keys) == ["0/a.png", "1/a.png", "b0.png", "b1.png"]
    assert samples.images.name(int(samples.rows[1])) == f"{tmp_path}/1.tar:a.png"
    write_tar(tmp_path / "train/0.tar", ("a.png", picture(0)), ("a.cls", "0"))
    (tmp_path / "list.txt").write_text("0.tar\n1.tar\ntrain/0.tar\n")
    with pytest.raises(UserError, match="split"):
        must(tmp_path / "list.txt")
    (tmp_path / "train").rename(tmp_path / "more")
    (tmp_path / "list.txt").write_text("0.tar\n1.tar\nmore/0.tar\n")
    with pytest.raises(UserError, match=r"more/0.tar"):
        must(tmp_path / "list.txt")


def test_names_and_templates_beside_the_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", 12, prefix="")
    (tmp_path / "classnames.txt").write_text("tench\ngreat white shark\ncock\nhen\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}.\n")
    data = ImageData(dataset="webdataset", root=str(tmp_path))
    data.setup()
    assert data.classnames == ["tench", "great white shark", "cock", "hen"]
    assert data.templates == ["a photo of a {}.", "a {}."]
    own = ImageData(dataset="webdataset", root=str(tmp_path), templates=["{}!"])
    own.setup()
    assert own.templates == ["{}!"]
    (tmp_path / "templates.txt").write_text("a photo\n")
    with pytest.raises(UserError, match="template"):
        must(tmp_path)


def test_classes_without_names_or_images_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path, 12)
    data = ImageData(dataset="webdataset", root=str(tmp_path))
    data.setup()
    assert "the shards have class numbers only" in caplog.text
    caplog.clear()
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    ImageData(dataset="webdataset", root=str(tmp_path), classnames=str(tmp_path / "names.txt")).setup()
    assert not caplog.text
    (tmp_path / "classnames.txt").write_text("a\nb\nc\nd\n")
    ImageData(dataset="webdataset", root=str(tmp_path), batch_size=4).setup("fit")
    assert "1 in train" in caplog.text and "the first: 'd'" in caplog.text


def test_classnames_for_labels_that_are_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", ("a.png", picture(0)), ("a.cls", "n02"), ("b.png", picture(1)), ("b.cls", "n01"))
    assert must(tmp_path).classes == ("n01", "n02")
    (tmp_path / "classnames.txt").write_text("n02\nn01\n")  # the order of the labels
    assert must(tmp_path).classes == ("n02", "n01") and must(tmp_path).labels.tolist() == [0, 1]
    (tmp_path / "classnames.txt").write_text("tench\nshark\n")  # names for the sorted labels
    assert must(tmp_path).classes == ("tench", "shark") and must(tmp_path).labels.tolist() == [1, 0]
    (tmp_path / "classnames.txt").write_text("n01\nshark\nhen\n")
    with pytest.raises(UserError, match="'n02'"):
        must(tmp_path)


def test_the_index_is_made_once_and_anew_when_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_shards(tmp_path, 20)
    scanned: list[str] = []
    scan = tars.scan

    def counting(shard: str) -> object:
        scanned.append(shard)
        return scan(shard)

    monkeypatch.setattr(tars, "scan", counting)
    data = ImageData(dataset="webdataset", root=str(tmp_path))
    data.prepare_data()
    assert scanned == list(map(str, paths))
    data.setup()
    assert len(scanned) == 3
    check(find("webdataset"), tmp_path, None)
    assert len(scanned) > 3  # a check trusts nothing
    scanned.clear()
    write_tar(paths[1], ("new.png", picture(0)), ("new.cls", "2"))
    assert len(must(tmp_path)) == 14 and len(scanned) == 3


def test_ranks_share_an_index_and_hold_few_bytes_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 14 million, ImageNet-21k, a rank holds 0.1 GB if validation has shards of its own, and 0.6 GB otherwise."""
    count, each = 30_000, 100

    def scan(shard: str) -> tuple[list[tars.Sample], str]:
        first = each * int(Path(shard).stem.rpartition("-")[2])
        numbers = range(first, first + each)
        return [tars.Sample(f"n{n % 997:05}_{n:08}.jpg", 512 * n, 9_000, f"n{n % 997:05}") for n in numbers], ""

    def memory() -> tuple[float, float]:
        """Bytes for each training sample, now and at most."""
        now, most = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        return now / count, most / count

    monkeypatch.setattr(tars, "scan", scan)
    monkeypatch.setattr(listing, "SETTLED_NS", -(10**12))
    for number in range(count // each):
        (tmp_path / f"train-{number}.tar").touch()
    tracemalloc.start()
    ImageData(dataset="webdataset", root=tmp_path).prepare_data()
    built = memory()
    monkeypatch.setattr(tars, "scan", lambda shard: pytest.fail("it is stored"))
    whole = must(tmp_path)
    held = memory()
    splits = Splits({"train": whole, "val": None, "test": whole.subset(np.arange(9))}.get)
    assert len(splits.train) + len(splits.val) == count
    parts = memory()
    tracemalloc.stop()
    assert built[1] < 220 and held[0] < 16 and held[1] < 40 and parts[0] < 56


def replaced(path: Path) -> None:
    write_tar(path.with_name("new"), ("a.png", picture(0)), ("a.cls", "1"), ("b.png", picture(1)), ("b.cls", "0"))
    path.with_name("new").replace(path)


def overwritten(path: Path) -> None:
    write_tar(path, ("a.png", picture(0)), ("a.cls", "1"), ("b.png", picture(1)), ("b.cls", "0"))


@pytest.mark.parametrize("change", [replaced, overwritten])
def test_another_shard_of_equal_size_and_time_is_noticed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = write_tar(tmp_path / "0.tar", ("a.png", picture(0)), ("a.cls", "0"), ("b.png", picture(1)), ("b.cls", "1"))
    before = path.stat()
    assert must(tmp_path).labels.tolist() == [0, 1]
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert must(tmp_path).labels.tolist() == [1, 0]


def one(tmp_path: Path, *members: tuple[str, bytes | str | int | dict]) -> Path:
    return write_tar(tmp_path / "0.tar", ("ok.png", picture(0)), ("ok.cls", "0"), *members)


@in_one_item(
    ("members", "message"),
    [
        ([("a.png", b""), ("a.cls", "0"), ("a.png", b"")], r"0.tar: the member 'a.png' is repeated, the second is at"),
        ([("a.png", b""), ("a.jpg", b""), ("a.cls", "0")], "'a' has 2 images; its members are a.png, a.jpg, a.cls"),
        ([("a.cls", "0")], "'a' has no image; its members are a.cls"),
        ([("a.png", b"")], "'a' has no label, its members are a.png. Expected a.cls, or a.json"),
        ([("a.png", b""), ("a.txt", "a cat")], "has a caption .*captions are not classes.*--data.dataset pairs"),
        ([("a.png", b""), ("a.cls", " ")], "a.cls has no class"),
        ([("a.png", b""), ("a.json", {"caption": "x"})], "a.json has no class"),
        ([("a.png", b""), ("a.json", {"label": 1.5})], "a.json has no class"),
        ([("a.png", b""), ("a.json", "{")], "a.json cannot be read"),
        ([("a.png", b""), ("a.cls", "-1")], r"0.tar:a.png: the label '-1' is not a number from 0 to 0"),
        ([("a.png", b""), ("a.cls", "cat")], r"some labels are numbers \(0\), others are names \('cat'\)"),
        ([("a.png", b""), ("a.cls", "99999999")], "the label 99999999 cannot be a class number"),
        ([("a.png", b""), ("a.cls", "01000000")], "0.tar:a.png: the label 01000000 cannot be a class number"),
    ],
)
def test_samples_that_make_no_sense(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        must(one(tmp_path, *members))


def test_labels_that_the_train_shards_lack(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", ("a.png", picture(0)), ("a.cls", "cat"))
    write_tar(tmp_path / "test.tar", ("b.png", picture(0)), ("b.cls", "cta"))
    with pytest.raises(UserError, match=r"test.tar:b.png"):
        must(tmp_path, "test")


def test_damaged_shards_are_named_with_the_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = one(tmp_path, ("a.png", picture(1)), ("a.cls", "0"))
    whole = path.read_bytes()
    begins = whole.index(b"a.png")
    path.write_bytes(whole[: begins + 700])
    with pytest.raises(UserError, match=rf"0.tar is cut off within the member 'a.png' that begins at byte {begins:,}"):
        must(tmp_path)
    path.write_bytes(whole[: begins + 100])
    with pytest.raises(UserError, match=r"0.tar is (damaged|cut off)"):
        must(tmp_path)
    path.write_bytes(whole[:begins] + b"rubbish" + whole[begins + 7 :])
    with pytest.raises(UserError, match=rf"0.tar is damaged at byte {begins:,}"):
        must(tmp_path)
    path.write_bytes(whole[:begins])
    assert len(must(tmp_path)) == 1 and "has no end mark: it may have been cut off" in caplog.text
    caplog.clear()
    assert len(must(tmp_path)) == 1 and "has no end mark" in caplog.text  # said again by the stored index
    for content in (b"", b"no tar at all" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"0.tar"):
            must(tmp_path)


def test_what_follows_an_end_mark_is_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path, other) = write_shards(tmp_path, 40, each=20)
    whole, more = path.read_bytes(), other.read_bytes()
    other.unlink()
    begins = whole.index(b"000004.png")
    path.write_bytes(whole[:begins] + bytes(8192) + whole[begins + 8192 :])
    with pytest.raises(
        UserError, match=rf"0.tar has an end mark at byte {begins:,}, but more data at byte [\d,]+: it is"
    ):
        must(tmp_path)
    path.write_bytes(whole + more)
    with pytest.raises(UserError, match=rf"but more data at byte {len(whole):,}: it is damaged, or several files"):
        must(tmp_path)
    path.write_bytes(whole + bytes(300_000))  # tar -b 600
    assert len(must(tmp_path)) == 20 and not caplog.text
    path.write_bytes(whole[:begins] + bytes(2_000_000))  # disk space was set aside for it, and not filled
    assert len(must(tmp_path)) == 4 and f"only zeros after byte {begins:,}" in caplog.text


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    path = one(tmp_path)
    info = tarfile.TarInfo("a.png")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % 5000  # its size with the holes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(header + path.read_bytes())
    with pytest.raises(UserError, match=r"0.tar"):
        must(tmp_path)


@in_one_item("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_negative_sizes_do_not_read_the_same_members_forever(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo(".hidden")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\0"  # -512
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = one(tmp_path)
    path.write_bytes(header + path.read_bytes())
    with pytest.raises(UserError, match=r"0.tar"):
        must(tmp_path)


def test_a_shard_that_changes_while_it_is_used(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, 3)
    samples = must(tmp_path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"train-000000.tar"):
        samples.images.load(2)
    path.unlink()
    samples = pickle.loads(pickle.dumps(samples))
    with pytest.raises(UserError, match="it does not exist"):
        samples.images.load(2)


def test_an_unreadable_image_is_named_by_shard_and_member(tmp_path: Path) -> None:
    one(tmp_path, ("bad.png", b"no image"), ("bad.cls", "0"))
    with pytest.raises(UserError, match=r"0.tar:bad.png"):
        pixels(must(tmp_path))
    assert "0.tar:bad.png" in str(check(find("webdataset"), tmp_path, None).problems[-1])


def test_compressed_shards(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"a.tar"):
        must(tmp_path)
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    for other in ("val-a.tgz", "b.tar.lz4"):  # neither the split nor the format hides the reason
        (tmp_path / other).write_bytes(b"packed")
        with pytest.raises(UserError, match=r"is compressed"):
            must(tmp_path)


@in_one_item(
    ("root", "message"),
    [
        ("nowhere", "does not exist; expected a folder of .tar files"),
        ("empty", "has no .tar files"),
        ("train-{0..2}.tar", r"The shard .*train-1.tar does not exist .* \(3 are listed by"),
        ("x*.tar", "No file matches"),
        ("pipe:cat train-0.tar", "does not exist"),
        ("lacks.txt", "lists no shards"),
        ("binary", "is neither a .tar file nor a text file"),
        ("only", "has no train shards, only test"),
        ("{0..9999999}.tar", "stands for more than 1,000,000 files"),
        ("ftp://host/*.tar", "works for local files only"),
        ("nope://host/a.tar", "cannot be read: Protocol not known"),
        ("{train-0.tar,train-0.tar}", "lists 1 shards more than once"),
    ],
)
def test_roots_that_name_no_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    layout(tmp_path, "train-0.tar", "only/test-0.tar")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lacks.txt").write_text("\n# nothing\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match=message):
        must(Path(root))
