import io
import json
import multiprocessing
import pickle
import shutil
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from randlora_pl.data import ImageData
from randlora_pl.data.readers.table import HubImages
from randlora_pl.utils.errors import UserError
from tests.data.readers.conftest import read_split, samples_in
from tests.support.products import marked

read = partial(read_split, "hf")
must = partial(samples_in, "hf")

datasets = pytest.importorskip("datasets", reason='Hugging Face folders need datasets: pip install ".[hf]"')


def encoded(seed: int, mode: str = "RGB", exif: int | None = None) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, len(mode)), dtype=np.uint8)
    stream = io.BytesIO()
    extra = {}
    if exif is not None:
        header = Image.Exif()
        header[0x0112] = exif
        extra = {"exif": header.tobytes()}
    Image.fromarray(pixels, mode).save(stream, "JPEG", quality=95, **extra)
    return {"bytes": stream.getvalue(), "path": f"{seed}.jpg"}


def images(count: int, label: object = None, **columns: list[Any]) -> Any:
    """``count`` images with the labels cat and dog in turn."""
    named = datasets.ClassLabel(names=["cat", "dog", "unused"])
    content = {"image": [encoded(number) for number in range(count)], "label": [number % 2 for number in range(count)]}
    features = {"image": datasets.Image(), "label": named}
    made = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and no network."""

    def connect(self: socket.socket, address: object) -> None:
        assert self.family == socket.AF_UNIX, "the network was asked"  # worker processes have pipes of that kind
        real(self, address)

    real = socket.socket.connect
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", connect)
    datasets.disable_progress_bars()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(**splits: Any) -> Path:
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return save


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two training files and a test file, as the hub names them."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        images(6).to_parquet(folder / f"data/train-0000{number}-of-00002.parquet")
    images(4).to_parquet(folder / "data/test-00000-of-00001-0a1b2c.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_saved_splits(saved: Callable[..., Path]) -> None:
    root = saved(train=images(6), validation=images(3), test=images(4))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert [len(must(root, split)) for split in ("train", "val", "test")] == [6, 3, 4]
    train = must(root)
    assert train.classes == ("cat", "dog") and train.labels.tolist() == [0, 1] * 3
    assert train.keys[:2] == ["train/00000000", "train/00000001"]
    assert must(root, "val").keys[0] == "val/00000000"
    with Image.open(io.BytesIO(encoded(3)["bytes"])) as original:
        assert np.array_equal(train.images.load(3), np.asarray(original))
    assert train.images.name(3) == f"{root}, split 'train', row 3"
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_single_set_is_split(tmp_path: Path) -> None:
    images(50).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one", "val") is read(tmp_path / "one", "test") is None
    data = ImageData(dataset="hf", root=str(tmp_path / "one"))
    data.setup()
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [36, 4, 10]


def test_parquet_files_of_the_hub(shards: Path) -> None:
    before = sorted(shards.rglob("*"))
    assert len(must(shards)) == 12 and must(shards, "test").labels.tolist() == [0, 1, 0, 1]
    assert must(shards).classes == ("cat", "dog") and read(shards, "val") is None
    assert must(shards).images.load(7).shape == (16, 20, 3)
    assert sorted(shards.rglob("*")) == before


def test_other_layouts_of_parquet_files(shards: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted" / "default"
    for name in ("train", "test"):
        (converted / name).mkdir(parents=True)
        shutil.copy(next(shards.glob(f"data/{name}*")), converted / name / "0000.parquet")
    assert (len(must(converted.parent)), len(must(converted.parent, "test"))) == (6, 4)
    (tmp_path / "lone").mkdir()
    shutil.copy(converted / "train" / "0000.parquet", tmp_path / "lone" / "photos.parquet")
    assert len(must(tmp_path / "lone")) == 6 and read(tmp_path / "lone", "test") is None


def test_incomplete_and_damaged_parquet_files(shards: Path) -> None:
    shutil.copytree(shards / "data", shards / "more")
    with pytest.raises(UserError, match=r"--data.root"):
        read(shards)
    shutil.rmtree(shards / "more")
    (shards / "data/train-00001-of-00002.parquet").rename(shards / "data/.hidden.parquet")
    with pytest.raises(UserError, match="'train'"):
        read(shards)
    (shards / "data/train-00001-of-00002.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"train-00001-of-00002.parquet"):
        read(shards)
    (shards / "data/train-00001-of-00002.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot be read"):
        read(shards)


def test_other_and_unlabelled_splits_are_left_out(saved: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    secret = images(3).remove_columns("label").add_column("label", [-1] * 3)
    secret = secret.cast_column("label", images(1).features["label"])
    root = saved(train=images(4), validation=images(3), test=secret, extra=images(2))
    assert len(must(root, "test")) == 3 and read(root, "val") is None
    for message in ("'extra' is not train", "'test' has no labels", "its val split is used for testing"):
        assert message in caplog.text


def test_no_train_split(saved: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="train"):
        read(saved(test=images(2)), "test")


def test_plain_labels(tmp_path: Path) -> None:
    made = images(4).remove_columns("label")
    made.add_column("labels", [10, 9, 100, 9]).save_to_disk(tmp_path / "numbers")
    assert must(tmp_path / "numbers").classes == ("9", "10", "100")
    assert must(tmp_path / "numbers").labels.tolist() == [1, 0, 2, 0]
    made.add_column("label", ["b", "a", "b", "a"]).save_to_disk(tmp_path / "words")
    assert must(tmp_path / "words").classes == ("a", "b")
    made.add_column("label", ["b", None, "b", "a"]).save_to_disk(tmp_path / "some")
    with pytest.raises(UserError, match=r"\('label'\)"):
        read(tmp_path / "some")


def test_class_without_training_images(saved: Callable[..., Path]) -> None:
    names = images(1).features["label"]
    strange = images(2).remove_columns("label").add_column("label", [0, 2]).cast_column("label", names)
    with pytest.raises(UserError, match="'unused'"):
        read(saved(train=images(4), test=strange), "test")


def test_columns_that_are_not_clear(tmp_path: Path) -> None:
    plain = images(2)
    plain.rename_column("label", "species").save_to_disk(tmp_path / "named")
    assert must(tmp_path / "named").classes == ("cat", "dog")  # the only ClassLabel, whatever it is called
    plain.remove_columns("label").add_column("species", [1, 2]).save_to_disk(tmp_path / "unnamed")
    with pytest.raises(UserError, match="label column is ambiguous"):
        read(tmp_path / "unnamed")
    plain.remove_columns("image").add_column("file", ["a.png", "b.png"]).save_to_disk(tmp_path / "paths")
    with pytest.raises(UserError, match="columns"):
        read(tmp_path / "paths")
    both = datasets.Dataset.from_dict({"mask": plain["image"], "image": plain["image"], "label": [0, 1]})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match="columns"):
        read(tmp_path / "both")


def test_fine_labels_come_first(tmp_path: Path) -> None:
    made = images(4).rename_column("label", "coarse_label").add_column("fine_label", [1, 0, 1, 0])
    made.cast_column("fine_label", datasets.ClassLabel(names=["x", "y"])).save_to_disk(tmp_path / "two")
    assert must(tmp_path / "two").classes == ("x", "y")


def test_images_without_the_feature(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "plain").mkdir()
    content = arrow.table({"image": [encoded(0), encoded(1)], "label": ["a", "b"]})
    parquet.write_table(content, tmp_path / "plain" / "train.parquet")
    assert must(tmp_path / "plain").images.load(1).shape == (16, 20, 3)


def test_images_are_decoded_by_our_rules(tmp_path: Path) -> None:
    cells = [encoded(0, exif=6), encoded(1, "CMYK"), {"bytes": b"no image", "path": "bad.png"}, None]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1]}, features=features)
    made.save_to_disk(tmp_path / "odd")
    held = must(tmp_path / "odd").images  # labels need no pixel
    assert held.load(0).shape == (20, 16, 3)  # upright
    assert held.load(1).shape == (16, 20, 3)
    with pytest.raises(UserError, match=r"\(bad.png\)"):
        held.load(2)
    with pytest.raises(UserError, match="empty"):
        held.load(3)


def _first(held: HubImages) -> int:
    return int(held.load(0).sum())


@pytest.mark.parametrize(("way",), marked(zip(["fork", "spawn"]), lambda row: row[0] in ("fork",)))
def test_worker_processes(saved: Callable[..., Path], way: str) -> None:
    if way not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {way} here")
    held = must(saved(train=images(4))).images
    assert len(pickle.dumps(held)) < 10_000  # names of files, not pixels
    with multiprocessing.get_context(way).Pool(1) as pool:
        assert pool.apply(_first, (held,)) == _first(held)


def test_wrong_folders(tmp_path: Path, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"Dataset.save_to_disk"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no dataset; expected"):
        read(tmp_path / "empty")
    root = saved(train=images(4))
    (arrow,) = (root / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-200])
    whole = pytest.raises(UserError, match="saved/train")
    with whole:
        must(root).images.load(3)
    arrow.write_bytes(b"nothing of the kind")
    with whole:
        read(root)
    arrow.unlink()
    with whole:
        read(root)
    (root / "dataset_dict.json").write_text(json.dumps({"split": []}))
    with pytest.raises(UserError, match=r"dataset_dict.json"):
        read(root)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"\[hf\]'"):
        read(root)
