"""``data check`` and ``data show``, over tiny copies of true on-disk formats."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from randlora_pl.data import sources
from randlora_pl.data.catalog import CATALOG, find
from randlora_pl.data.install import _decode
from randlora_pl.data.readers import Samples, table
from tests.data.conftest import Tree, save_image, tree  # noqa: F401  (a fixture)
from tests.data.readers import BUILDERS
from tests.data.readers.own.tars import write_shards
from tests.support.cli import Refused, Run
from tests.support.products import in_one_item, marked


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    BUILDERS["eurosat"](root := tmp_path_factory.mktemp("built"))
    return root


@pytest.fixture
def eurosat(built: Path, tmp_path: Path) -> Path:
    """Ten classes with 3 training, 1 validation and 2 test images."""
    return Path(shutil.copytree(built, tmp_path / "sets"))


@pytest.fixture
def tiny_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(find("eurosat"), counts={"train": 30, "val": 10, "test": 20})
    monkeypatch.setitem(CATALOG, "eurosat", row)


def images(root: Path) -> list[Path]:
    return sorted(root.rglob("*.jpg"))


def test_digits_are_complete(run: Run) -> None:
    result = run("data", "check", "digits")
    assert result.code == 0, result.out
    lines = result.out.splitlines()
    assert lines[1].split() == ["digits", "train", "1,294", "1,294", "125", "(eight)", "131", "(one)", "8"]
    assert lines[-2:] == [
        "24 of 1,797 images were decoded (--every-image decodes all)",
        "1 dataset: 1 as expected, 0 off, 0 missing",
    ]


def test_fast_is_fast_and_decodes_nothing(run: Run, eurosat: Path, tiny_counts: None) -> None:
    for path in images(eurosat):
        path.write_bytes(b"")
    run("data", "check", "digits", "--fast")  # whatever must be imported
    start = time.perf_counter()
    result = run("data", "check", "eurosat", "--root", str(eurosat), "--fast")
    assert time.perf_counter() - start < 1
    assert result.code == 0 and result.out.splitlines()[1].split()[-1] == "0"


def test_every_image_and_those_that_are_unreadable(
    run: Run, refused: Refused, eurosat: Path, tiny_counts: None
) -> None:
    words = ("data", "check", "eurosat", "--root", str(eurosat), "--every-image")
    result = run(*words)
    assert result.code == 0, result.out
    assert [int(line.split()[-1]) for line in result.out.splitlines()[1:4]] == [30, 10, 20]
    broken = [path for path in images(eurosat) if path.parent.name in ("Forest", "River")]
    for path in broken:
        path.write_bytes(b"no image")
    result = run(*words)
    assert result.code == 1 and str(broken[0]) in result.out and "eurosat is off:" in result.out
    assert "1 more train images cannot be read" in result.out  # 6 of them, 5 named
    assert result.out.splitlines()[1].split()[-1] == "24"
    for path in images(eurosat):
        path.write_bytes(b"")
    message = refused("data", "show", "eurosat", "--root", str(eurosat))
    assert "cannot be read" in message and "--root" in message and "on_error" not in message


def test_counts_that_are_off(run: Run, eurosat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("data", "check", "eurosat", "--root", str(eurosat))
    result = run(*words, "digits")
    assert result.code == 1 and result.out.splitlines()[1].split()[-1] == "OFF"
    assert "EuroSAT (RGB): 30 train images, expected 21,600" in result.out
    assert "2 datasets: 1 as expected, 1 off, 0 missing" in result.out
    monkeypatch.setitem(CATALOG, "eurosat", replace(find("eurosat"), counts={"train": 30, "val": 10, "test": 20}))
    forest = sorted((eurosat / "eurosat/2750/Forest").iterdir())
    for path in forest[3:]:
        path.unlink()
    result = run(*words)
    assert result.code == 1 and "classes have no " in result.out and "0 (forest)" in result.out
    for path in forest[:3]:
        path.unlink()
    result = run(*words)
    assert result.code == 1 and "1 of 10 classes have no training images, the first: 'forest'" in result.out


def test_missing_is_one_line_with_the_way_to_get_it(run: Run, tmp_path: Path) -> None:
    result = run("data", "check", "cifar10", "cars", "--root", str(tmp_path))
    assert result.code == 1
    cifar, cars, verdict = result.out.splitlines()
    assert f"cifar10 is not in {tmp_path}: expected cifar-10-batches-py/" in cifar
    assert f"get it: randlora-pl data get cifar10 --root {tmp_path}" in cifar
    assert f"data get cars --root {tmp_path}" in cars and find("cars").layout in cars
    assert verdict.endswith("0 off, 2 missing")


def test_all(run: Run, eurosat: Path, tiny_counts: None) -> None:
    result = run("data", "check", "--all", "--root", str(eurosat), "--fast")
    assert result.code == 1
    assert all(f"\n{row.name} " in result.out for row in CATALOG.values() if not row.own)
    assert "3 as expected, 0 off" in result.out.splitlines()[-1]  # digits and mnist_5k need no files


def test_own_folder(run: Run, tree: Tree) -> None:  # noqa: F811
    root = tree(cat=30, dog=21)
    result = run("data", "check", "folder", "--root", str(root), "--every-image")
    assert result.code == 0, result.out
    counts = [line.split() for line in result.out.splitlines()[1:4]]
    assert sum(int(line[-1]) for line in counts) == 51
    assert result.out.splitlines()[1].count("(dog)") == result.out.splitlines()[1].count("(cat)") == 1
    (root / "cat" / "000.png").write_bytes(b"")
    assert run("data", "check", "folder", "--root", str(root), "--every-image").code == 1
    shutil.rmtree(root / "dog")
    result = run("data", "check", "folder", "--root", str(root))
    assert result.code == 1 and "the only class is 'cat'" in result.out
    shutil.rmtree(root)
    result = run("data", "check", "folder", "--root", str(tree(a=1, b=1)))
    assert result.code == 1 and "no test images" in result.out


def test_own_pairs(run: Run, tmp_path: Path) -> None:
    for number in range(20):
        save_image(tmp_path / f"{number}.png", number)
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\n" + "".join(f"{n}.png,picture {n}\n" for n in range(20)))
    assert run("data", "check", "pairs", "--root", str(table)).code == 0
    result = run("data", "show", "pairs", "--root", str(table), "--shots", "1", "--output", "sheet.png")
    assert result.code == 0 and "all captions" in result.out


@pytest.mark.parametrize(
    ("root",),
    marked(
        zip(["shards", "shards/train-{000000..000004}.tar", "shards/*.tar", "list.txt"]),
        lambda row: row[0] in ("shards", "list.txt"),
    ),
)
def test_own_shards(run: Run, tmp_path: Path, root: str) -> None:
    paths = write_shards(tmp_path / "shards", 35)
    (tmp_path / "list.txt").write_text("shards/train-*.tar\n")
    result = run("data", "check", "webdataset", "--root", root, "--every-image")
    assert result.code == 1 and "classes without images: 1 in val" in result.out, result.out
    assert sum(int(line.split()[-1]) for line in result.out.splitlines()[1:4]) == 35
    result = run("data", "show", "webdataset", "--root", root, "--shots", "1", "--output", "sheet.png")
    assert result.code == 0 and "train 26, val 2, test 7" in result.out, result.out + result.err
    paths[2].write_bytes(paths[2].read_bytes()[:2_000])
    result = run("data", "check", "webdataset", "--root", root)
    assert result.code == 1 and "shards/train-000002.tar is cut off within the member" in result.out
    url = "http://127.0.0.1:9//a.tar?b=c//d"  # it stays as it was typed
    result = run("data", "check", "webdataset", "--root", url)
    assert f"The shard {url} cannot be read: Connect call failed" in result.out


@in_one_item(
    ("words", "hint"),
    [
        (["chek", "digits"], "'check'"),
        (["check"], "no dataset is named"),
        (["check", "digits", "--all"], "--all"),
        (["check", "digits", "--fast", "--every-image"], "cannot be combined"),
        (["check", "digits", "--root", "nowhere"], "does not exist; it is the folder that holds"),
        (["check", "table", "--root", "no.csv"], "--root no.csv does not exist; expected a CSV, TSV or Parquet file"),
        (["show", "webdataset", "--root", "pipe:cat a.tar"], "pipe:cat a.tar"),
        (["check", "jsonl", "--root", "mine"], "(or --model TextClassificationTask): randlora-pl fit"),
        (["show", "rte"], "fit --model TextClassificationTask --data.dataset rte --data.root PATH --dry-run"),
        (["check", "folder"], "data check folder --root FOLDER"),
        (["show", "pairs"], "data show pairs --root FILE.csv"),
        (["check", "webdataset"], "data check webdataset --root SHARDS"),
        (["show", "webdataset", "--root", "no-{0..3}.tar"], "The shard no-0.tar does not exist"),
        (["show", "cifar10", "--root", "."], "randlora-pl data get cifar10 --root ."),
        (["show", "digits", "--output", "sheet.jpg"], "PNG"),
        (["show", "digits", "--output", "not/there.png"], "mkdir"),
    ],
)
def test_mistakes(refused: Refused, words: list[str], hint: str) -> None:
    assert hint in refused("data", *words)


def test_show_writes_a_sheet_and_prints_the_prompts(run: Run, tmp_path: Path, eurosat: Path) -> None:
    result = run("data", "show", "eurosat", "--root", str(eurosat), "--shots", "2", "--output", "sheet.png")
    assert result.code == 0, result.err
    assert "train 30, val 10, test 20" in result.out and "all classes" in result.out
    assert "  a centered satellite photo of annual crop land.\n" in result.out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 400
        colours = sheet.convert("RGB").getcolors(2**20)
    assert colours is not None and len(colours) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sets", "sheet.png"]


def test_show_some_of_many_classes(run: Run, tmp_path: Path) -> None:
    BUILDERS["oxfordpets"](tmp_path)
    result = run("data", "show", "oxfordpets", "--root", str(tmp_path), "--shots", "1")
    assert "20 of 37 classes, evenly chosen" in result.out
    assert (tmp_path / "contact-sheet-oxfordpets.png").exists()


def test_show_overwrites_only_its_own_file(
    run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("data", "show", "digits", "--shots", "1").code == run("data", "show", "digits", "--shots", "1").code == 0
    (tmp_path / "mine.png").write_text("mine")
    assert "mine.png exists" in refused("data", "show", "digits", "--output", "mine.png")
    assert (tmp_path / "mine.png").read_text() == "mine"
    monkeypatch.setattr(Image.Image, "save", Mock(side_effect=OSError(28, "No space left on device")))
    assert "space" in refused("data", "show", "digits")


def test_sheet_shows_the_images_of_few_shot_training(tmp_path: Path) -> None:
    from randlora_pl.data import ImageData
    from randlora_pl.data.unlabelled import Sheet

    data = ImageData(dataset="digits", shots=3)
    data.setup()
    few = data.samples("train")
    trained = {few.images.load(row).tobytes() for row in few.rows.tolist()}
    sheet = Sheet.read(find("digits"), tmp_path, 3)
    assert {image.tobytes() for images in sheet.images for image in images} == trained
    assert sheet.names == list(find("digits").classnames)


def test_images_are_read_and_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, png = tmp_path / "a.jpg", tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(file)
    Image.new("RGBA", (9, 9), "red").save(png)
    opened = Mock(side_effect=Image.open)
    monkeypatch.setattr(Image, "open", opened)
    cells = [{"image": {"bytes": file.read_bytes(), "path": "a.jpg"}}]
    boxes = np.array([[0, 0, 4, 4]])
    for images in (
        sources.FileImages([file]),
        sources.BoxImages([file], boxes=boxes),
        table.HubImages(cells, "it", tmp_path),
        sources.BoxImages([png], boxes=boxes),
    ):
        opened.reset_mock()
        assert list(_decode(Samples(images, np.array([0]), np.array([0]), ["a"], ("a",)), [0])) == [([], 1, 0)]
        assert opened.call_count == 1, images


def test_transparent_images_are_counted(run: Run, tmp_path: Path) -> None:
    for label in ("disc", "box"):
        (tmp_path / "pics" / label).mkdir(parents=True)
        for number in range(6):
            image = Image.new("RGBA", (8, 8), (255, 0, 0, 0 if label == "box" else 255))  # discs have no hole
            image.save(tmp_path / "pics" / label / f"{number}.png")
    out = run("data", "check", "folder", "--root", "pics", "--every-image").out
    assert "folder: 6 of 12 decoded images are transparent. They are laid on white" in out
    assert "transparent" not in run("data", "check", "digits").out
