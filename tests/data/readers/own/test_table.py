import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from randlora_pl.data import ImageData
from randlora_pl.data.splits import Splits
from randlora_pl.utils.errors import UserError
from tests.data.conftest import save_image
from tests.data.readers.conftest import read_split, samples_in
from tests.support.products import in_one_item

read = partial(read_split, "table")
must = partial(samples_in, "table")
pairs = partial(read_split, "pairs")


def write(folder: Path, text: str, name: str = "photos.csv", images: int = 4, encoding: str = "utf-8") -> Path:
    for number in range(images):
        save_image(folder / "images" / f"{number}.png", number)
    (folder / name).write_text(text, encoding=encoding)
    return folder / name


def parquet(folder: Path, name: str = "photos.parquet", images: int = 4, **columns: object) -> Path:
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    path = write(folder, "", name, images)
    parquet.write_table(arrow.table(columns), path)
    return path


SPLITS = "path,label,split\nimages/1.png,dog,train\nimages/0.png,cat,train\nimages/2.png,dog,validation\n"


def test_columns_of_a_csv_file(tmp_path: Path) -> None:
    path = write(tmp_path, SPLITS + "images/3.png,cat,Testing\n")
    train = must(path)
    assert train.classes == ("cat", "dog") and train.labels.tolist() == [0, 1]
    assert train.keys == ["images/0.png", "images/1.png"]
    assert train.images.name(int(train.rows[1])) == str(tmp_path / "images/1.png")
    assert train.images.load(int(train.rows[0])).shape == (16, 20, 3)
    assert must(path, "val").labels.tolist() == [1] and must(path, "test").keys == ["images/3.png"]
    assert pickle.loads(pickle.dumps(train)).keys == train.keys


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("a.csv", "path,label\r\nimages/0.png,cat\r\nimages/1.png,dog\r\n", "utf-8-sig"),
        ("a.csv", "path;label\nimages/0.png;cat\nimages/1.png;dog\n", "utf-8"),
        ("a.tsv", "path\tlabel\nimages/0.png\tcat\nimages/1.png\tdog\n", "utf-8"),
        ("a.CSV", '"Label"," Image "\n"cat","images/0.png"\n\n"dog","images/1.png"\n,\n', "utf-8"),
        ("a.txt", "file_name,class,note\n./images/0.png, cat ,\nimages/../images/1.png,dog,x\n", "utf-8"),
        ("a.csv", "filename,label\nimages\\0.png,cat\n.\\images\\1.png,dog\n", "utf-8"),
    ],
)
def test_what_spreadsheets_make_of_a_table(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    samples = must(write(tmp_path, text, name, encoding=encoding))
    assert (samples.classes, samples.labels.tolist()) == (("cat", "dog"), [0, 1])
    assert samples.keys == ["images/0.png", "images/1.png"]


def test_absolute_paths(tmp_path: Path) -> None:
    outside = save_image(tmp_path / "elsewhere" / "x.png")
    path = write(tmp_path / "home", f"path,label\n{tmp_path}/home/images/0.png,cat\n{outside},dog\n")
    samples = must(path)
    assert samples.keys == [str(outside), "images/0.png"]  # what is below the table has the same name everywhere
    assert samples.images.load(0).shape == (16, 20, 3)


def test_names_do_not_depend_on_how_the_root_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "home", f"path,label\n{tmp_path}/home/images/0.png,cat\n../home/images/1.png,dog\n")
    (tmp_path / "sub/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    (tmp_path / "away").symlink_to(tmp_path / "sub/deep")
    monkeypatch.chdir(tmp_path)
    roots = ["home/photos.csv", "sub/../home/photos.csv", "link/photos.csv", "away/../../home/photos.csv", path]
    for root in map(Path, roots):
        samples = must(root)
        assert samples.keys == ["images/0.png", "images/1.png"]
        assert samples.images.load(1).shape == (16, 20, 3)
    path.write_text(f"path,label\n{tmp_path}/link/images/0.png,cat\n../link/images/1.png,dog\n")
    assert must(path).keys == ["images/0.png", "images/1.png"]
    (tmp_path / "home").rename(tmp_path / "moved")
    (tmp_path / "moved/images").rename(tmp_path / "images")
    (tmp_path / "moved/photos.csv").write_text("path,label\n../images/0.png,cat\n../images/1.png,dog\n")
    assert must(Path("moved/photos.csv")).keys == ["../images/0.png", "../images/1.png"]  # wherever both folders lie


@pytest.mark.parametrize("other", ["{home}/images/0.png", "../home/images/0.png", "{home}/../link/images/0.png"])
@in_one_item("root", ["home/photos.csv", "link/photos.csv", "sub/../home/photos.csv"])
def test_an_image_under_two_names_is_listed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, other: str
) -> None:
    path = write(tmp_path / "home", "")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(path.parent)
    path.write_text(f"path,label,split\nimages/0.png,a,train\n{other.format(home=path.parent)},a,test\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"images/0.png"):
        read(Path(root))
    save_image(tmp_path / "else/0.png")
    path.write_text(f"path,label,split\n../else/0.png,a,train\n{tmp_path}/else/0.png,a,test\n")
    with pytest.raises(UserError, match=r"../else/0.png"):
        read(Path(root))


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    names = [f"images/{number}.png" for number in range(3)]
    path = parquet(tmp_path, path=names, label=["b", "a", "b"], split=["train", "train", "test"])
    assert must(path).classes == ("a", "b") and must(path, "test").labels.tolist() == [1]
    path = parquet(tmp_path, path=names, label=[10, 9, 10])
    assert must(path).classes == ("9", "10") and must(path).labels.tolist() == [1, 0, 1]


def test_parquet_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path, path=["images/0.png", "images/9.png"], label=["a", "b"])
    with pytest.raises(UserError, match=r"images/9.png"):
        read(path)
    with pytest.raises(UserError, match="label"):
        read(parquet(tmp_path, path=["images/0.png", "images/1.png"], label=["a", None]))
    with pytest.raises(UserError, match="'label'"):
        read(parquet(tmp_path, path=["images/0.png"], lable=["a"]))
    with pytest.raises(UserError, match=r"--data.dataset"):
        read(parquet(tmp_path, image=[{"bytes": b"x", "path": "a.png"}], label=[0]))
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot be read"):
        read(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"\[parquet\]'"):
        read(path)


def test_whole_numbers_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    lines = "".join(f"images/{place}.png,{label}\n" for place, label in enumerate(("10", "9", "100", "9")))
    samples = must(write(tmp_path, "path,label\n" + lines))
    assert samples.classes == ("9", "10", "100") and samples.labels.tolist() == [1, 0, 2, 0]
    samples = must(write(tmp_path, "path,label\n" + lines.replace("\n", ".0\n")))  # pandas, where a label lacks
    assert samples.classes == ("9.0", "10.0", "100.0") and samples.labels.tolist() == [1, 0, 2, 0]
    with pytest.raises(UserError, match=r"'7.0'"):
        read(write(tmp_path, "path,label\nimages/0.png,7\nimages/1.png,7.0\n"))
    with pytest.raises(UserError, match="'07'"):
        read(write(tmp_path, "path,label\nimages/0.png,7\nimages/1.png,07\n"))


def test_classes_are_those_of_the_train_split(tmp_path: Path) -> None:
    path = write(tmp_path, SPLITS + "images/3.png,catt,test\n")
    with pytest.raises(UserError, match="'catt'"):
        read(path, "test")


def test_a_lone_validation_split_is_for_testing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, SPLITS)
    assert must(path, "test").keys == ["images/2.png"] and read(path, "val") is None
    assert "its val split is used for testing" in caplog.text


def test_without_splits_some_are_set_aside(tmp_path: Path) -> None:
    lines = "".join(f"images/{number}.png,{'ab'[number % 2]}\n" for number in range(50))
    data = ImageData(dataset="table", root=str(write(tmp_path, "path,label\n" + lines, images=50)))
    data.setup()
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [36, 4, 10]
    assert np.bincount(data.samples("test").labels).tolist() == [5, 5]


@in_one_item(
    ("text", "message"),
    [
        ("", "line 1: no column 'path' among none"),
        ("pathh,label\nimages/0.png,a\n", r"no column 'path' among pathh, label. Did you mean 'pathh'\?"),
        ("path,lable\nimages/0.png,a\n", r"no column 'label'.*Expected path,label\[,split\]"),
        ("path,file,label\nimages/0.png,x,a\n", "'path' and 'file' may both be the path; rename one"),
        ("images/0.png,cat\nimages/1.png,dog\n", "line 1: no column 'path' among images/0.png, cat"),
        ("path,label\n", "has no rows below its header"),
        ("path,label\nimages/0.png,\n", "line 2: the label is empty"),
        ("path,label\n\n ,cat\n", "line 3: the path is empty"),
        ("path,label\nimages/0.png,cat,dog\n", r"line 2: expected 2 fields \(path,label\); quote commas"),
        ('path,label\nimages/0.png,"cat\nimages/1.png,dog\n', "unexpected end of data; check the quotation marks"),
        ("path,label,split\nimages/0.png,a,tran\n", r"line 2: unknown split 'tran'.* Did you mean 'train'"),
        ("path,label,split\nimages/0.png,a,\n", "line 2: unknown split ''"),
        ("path,label,split\nimages/0.png,a,test\n", "has no train split among test"),
        ("path,label\nimages/8.png,a\nimages/0.png,b\nnowhere/0.png,c\n", "2 image files .*: line 2: .*images/8.png"),
        ("path,label\nimages/0.png,a\nimages/1.png,b\n./images/0.png,a\n", "line 4: .* already in line 2, and would"),
        ("path,label\nimages/0.png,a\nimages/0.png,b\n", "line 3: .* already in line 2, as 'a' and 'b'"),
        ("path,label\n" + 5000 * "x" + ",a\n", "1 image file does not exist, the first: line 2"),
        ("path,label\n" + 5000 * "x" + "/0.png,a\n", "1 image file does not exist, the first: line 2"),
        ("path,label\n../im\0ages/0.png,a\n", "1 image file does not exist, the first: line 2"),
        (SPLITS + "images/0.png,cat,test\n", "line 5: .* already in line 3, in the splits 'train' and 'test'"),
    ],
)
def test_wrong_lines_are_numbered(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, text), "train")


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data.root"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(UserError, match="CSV"):
        read(write(tmp_path, "", "a.xlsx"))
    with pytest.raises(UserError, match="UTF-8"):
        read(write(tmp_path, "path,label\nimages/0.png,caf\u00e9\n", encoding="latin-1"))


def test_each_folder_is_listed_once_and_no_file_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "path,label\n" + "".join(f"images/{number}.png,a\n" for number in range(30)), images=30)
    listed: list[str] = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda place: listed.append(str(place)) or listdir(place))
    asked: list[Path] = []
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: asked.append(self) or is_file(self))
    assert len(must(path)) == 30
    assert listed == [str(tmp_path / "images")] and asked == [path]


def test_captions_are_numbered_over_all_splits(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'image,caption,split\nimages/1.png,"a dog, asleep",train\nimages/0.png,a cat,train\n'
        "images/0.png,an animal,train\nimages/2.png,a cat,test\n",
    )
    train, test = pairs(path), pairs(path, "test")
    assert train is not None and test is not None and pairs(path, "val") is None
    assert train.classes == test.classes == ("a cat", "a dog, asleep", "an animal")
    assert train.labels.tolist() == [0, 2, 1] and test.labels.tolist() == [0]
    assert train.rows.tolist() == [0, 0, 1] and test.rows.tolist() == [2]
    assert train.images.name(1).endswith("images/1.png") and train.images.load(1).shape == (16, 20, 3)


def test_captions_of_an_image_stay_in_one_split(tmp_path: Path) -> None:
    lines = [f"images/{number}.png,caption {number} {variant}" for number in range(20) for variant in range(3)]
    path = write(tmp_path, "image,caption\n" + "\n".join(reversed(lines)), images=20)
    found = Splits(lambda split: pairs(path, split))
    parts = [set(part.rows.tolist()) for part in (found.train, found.val, found.test)]
    assert [len(part) for part in parts] == [15, 1, 4] and len(set.union(*parts)) == 20
    assert len(found.test) == 12
    again = Splits(lambda split: pairs(write(tmp_path, "image,caption\n" + "\n".join(lines), images=20), split))
    assert again.test.keys == found.test.keys and np.array_equal(again.test.labels, found.test.labels)


@pytest.mark.parametrize("second", ["images/0.png", "./images/0.png", "images/../images/0.png"])
def test_an_image_in_two_splits_is_refused(tmp_path: Path, second: str) -> None:
    path = write(tmp_path, f"image,caption,split\nimages/0.png,a cat,train\n{second},a dog,test\n")
    with pytest.raises(UserError, match=r"images/0.png"):
        pairs(path)


@in_one_item(
    ("text", "message"),
    [
        ("image,captoin\nimages/0.png,a", r"line 1: no column 'caption' among image, captoin. Did you mean 'captoin'"),
        ("image,caption\nimages/0.png,a\nimages/1.png,\n", "line 3: the caption is empty"),
        ("image,caption\n,a\n", "line 2: the image is empty"),
        ("image,caption,split\nimages/0.png,a\n", "line 2: expected 3 fields"),
        ("image,caption\nimages/9.png,a\nimages/0.png,b\nimages/8.png,c\n", r"2 image files do not .*line 2: .*9.png"),
        ("image,caption\n", "has no rows below its header"),
        ("image,caption,split\nimages/0.png,a,test\n", "no line for the split 'train'"),
    ],
)
def test_wrong_lines_of_captions_are_numbered(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pairs(write(tmp_path, text))
